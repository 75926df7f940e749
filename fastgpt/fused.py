"""The fused path of a GPT: which tensors it takes, and the units and launchers it takes them with.

    embed -> block -> ... -> block -> norm -> head and loss

Each arrow is one autograd unit (fused_block.py, fused_head.py) that owns its forward and backward.
A Path is made per forward. There is none, and the modules run one by one, under backend "torch",
where a kernel cannot run, and under torch.compile: units that are opaque to it have cost others
more than their kernels gained, as its fusion stops at each. These are for who does not compile.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import aten, backend, fused_block, fused_head, ops, sdpa
from fastgpt.fused_block import Launchers, Settings, Weights

Low = Callable[[Tensor], Tensor]


class Path(NamedTuple):
    run: Launchers
    add_rows_: Callable[..., None]
    cross_entropy_: Callable[..., Tensor]
    settings: Settings
    dtype: torch.dtype  # of the matmuls
    low: Low

    def embed(self, idx: Tensor, wte: Tensor, wpe: Tensor) -> tuple[Tensor, Tensor]:
        """idx (B, T) -> x (B, T, C), and wte's alias for the head (fused_head.py)."""
        return fused_head.embed(self.add_rows_, idx, wte, wpe)

    def takes(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether these are plain tensors of one dtype on one device."""
        return all(
            _plain(t) and t.dtype == x.dtype and t.device == x.device
            for t in (x, *others)
            if t is not None
        )

    def block(self, delta: Tensor | None, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """The residual stream x + delta through one block -> the same in two terms again."""
        matrices = {n: t for n, t in weights._asdict().items() if t is not None and "ln" not in n}
        low = weights._replace(**{name: self.low(t) for name, t in matrices.items()})
        with torch.autocast(x.device.type, enabled=False):  # every dtype is chosen here
            return fused_block.block(self.run, self.settings, delta, x, weights, low)

    def norm(self, delta: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The LayerNorm of x + delta, in the matmuls' dtype."""
        return fused_block.norm(self.run, delta, x, weight, bias, self.dtype)

    def loss(self, x: Tensor, alias: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x (B, T, C), weight (V, C) and its alias, targets (B*T,) -> mean cross entropy."""
        rows, low = x.view(-1, x.shape[-1]), self.low(weight)
        return ops.in_place_loss(self.cross_entropy_, rows, alias, low, targets, -1)


def _plain(t: Tensor) -> bool:
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return type(t) in (Tensor, nn.Parameter) and not is_wrapped(t)


def path(
    x: Tensor, n_head: int, T: int, tanh: bool, dropout_p: float, low: Low | None = None
) -> Path | None:
    """The units for sequences of T and parameters of x's dtype, device and last dimension, C.

    `low` gives a parameter in the matmuls' dtype, without autograd; by default it is cast.
    """
    if torch.compiler.is_compiling() or T == 0 or not _plain(x) or x.shape[-1] % n_head:
        return None
    dtype = x.dtype
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    qkv = x.new_empty((1, T, 3 * x.shape[-1]), dtype=dtype)
    facts = dict(n_head=n_head, dropout_p=dropout_p)
    implementation = backend.choose("block", why_not, (qkv,), facts)
    if implementation == "torch":
        return None
    make = _aten if implementation == "aten" else _kernels
    settings = Settings(n_head, tanh, dropout_p)
    low = low or (lambda t: t.detach().to(dtype))
    run, add_rows_, cross_entropy_ = make(qkv, n_head, dropout_p)
    return Path(run, add_rows_, cross_entropy_, settings, dtype, low)


def why_not(
    op: str, implementation: str, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]
) -> str | None:
    """Why no unit can be made of this implementation, or None."""
    (qkv,), n_head, dropout_p = tensors, facts["n_head"], facts["dropout_p"]
    if implementation == "aten":
        attention = sdpa.choice(qkv, n_head, dropout_p)
        return aten.unsupported(tensors) if attention else "SDPA has no fused dropout on a CPU"
    for part, choice in _parts(qkv, n_head, dropout_p).items():
        if choice.implementation in ("torch", "flash-attn") and (
            part != "packed_causal_attention" or sdpa.choice(qkv, n_head, dropout_p) is None
        ):
            return f"{part} runs in {choice.implementation}: {choice.reason}"
    return None


def _parts(qkv: Tensor, n_head: int, dropout_p: float) -> dict[str, backend.Choice]:
    C = qkv.shape[-1] // 3
    facts: dict[str, dict[str, Any]] = {
        "add_layer_norm": dict(width=C),
        "mlp": {},
        "packed_causal_attention": dict(head_dim=C // n_head, dropout_p=dropout_p),
    }
    return {op: backend.explain(op, ops.why_not, (qkv,), facts[op]) for op in facts}


def _aten(qkv: Tensor, n_head: int, dropout_p: float):
    attention = sdpa.choice(qkv, n_head, dropout_p)
    assert attention is not None  # why_not has asked
    run = Launchers(
        aten.norm, aten.add_norm, aten.norm_backward, aten.linear_gelu, aten.gelu_backward,
        attention.packed_forward, attention.packed_backward,
    )  # fmt: skip
    return run, aten.add_rows_, aten.cross_entropy_


def _kernels(qkv: Tensor, n_head: int, dropout_p: float):
    from fastgpt.kernels import attention, cross_entropy, embedding, gelu_mlp, gemm_gelu, layer_norm

    parts = _parts(qkv, n_head, dropout_p)
    own_gemm = parts["mlp"].implementation == "triton"
    name = parts["packed_causal_attention"].implementation
    if name == "triton":
        attend = attention.seeded_forward, attention.seeded_backward
    else:
        held = sdpa.choice(qkv, n_head, dropout_p) if name == "torch" else getattr(sdpa, name)
        assert held is not None  # why_not has asked
        attend = held.packed_forward, held.packed_backward
    run = Launchers(
        layer_norm.forward, layer_norm.add_forward, layer_norm.backward,
        gemm_gelu.forward if own_gemm else gelu_mlp.cublas_gelu, gelu_mlp.gelu_backward, *attend,
    )  # fmt: skip
    return run, embedding.add_rows_, cross_entropy.cross_entropy_
