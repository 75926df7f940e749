"""The fused path of a GPT: which tensors it takes, and the units and launchers it takes them with.

    embed -> block -> ... -> block -> norm -> head and loss

Each arrow is one autograd unit (block.py, embedding.py) that owns its forward and backward.
A Path is made per forward. There is none, and the modules run one by one, under backend "torch",
where a kernel cannot run, and under torch.compile: units that are opaque to it have cost others
more than their kernels gained, as its fusion stops at each. These are for who does not compile.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import backend, ops
from fastgpt.fused import block, embedding
from fastgpt.fused.block import Launchers, Settings, Weights
from fastgpt.implementations import aten, sdpa

Low = Callable[[Tensor], Tensor]
Attention = tuple[Callable[..., Any], Callable[..., Any]]  # forward, backward
Made = tuple[Launchers, Callable[..., None], Callable[..., Tensor]]  # a Path's first three


class Path(NamedTuple):
    run: Launchers
    add_rows_: Callable[..., None]
    cross_entropy_: Callable[..., Tensor]
    settings: Settings
    dtype: torch.dtype  # of the matmuls
    low: Low

    def embed(self, idx: Tensor, wte: Tensor, wpe: Tensor) -> tuple[Tensor, Tensor]:
        """idx (B, T) -> x (B, T, C), and wte's alias for the head (embedding.py)."""
        return embedding.embed(self.add_rows_, idx, wte, wpe)

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
            return block.block(self.run, self.settings, delta, x, weights, low)

    def norm(self, delta: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The LayerNorm of x + delta, in the matmuls' dtype."""
        return block.norm(self.run, delta, x, weight, bias, self.dtype)

    def loss(self, x: Tensor, alias: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """x (B, T, C), weight (V, C) and its alias, targets (B*T,) -> mean cross entropy."""
        rows, low = x.reshape(-1, x.shape[-1]), self.low(weight)
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
    dtype = ops.autocast_dtype(x)
    qkv = x.new_empty((1, T, 3 * x.shape[-1]), dtype=dtype)
    maker = Maker()
    facts = dict(n_head=n_head, dropout_p=dropout_p)
    if backend.choose("block", maker, (qkv,), facts) == "torch":
        return None
    settings = Settings(n_head, tanh, dropout_p)
    return Path(*maker.made, settings, dtype, low or (lambda t: t.detach().to(dtype)))


class Maker:
    """Answers backend.py why an implementation cannot run; what it made to find out is kept."""

    made: Made

    def __call__(
        self, op: str, implementation: str, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]
    ) -> str | None:
        make = _aten if implementation == "aten" else _kernels
        made = make(tensors[0], **facts)
        if isinstance(made, str):
            return made
        self.made = made
        return None


def _aten(qkv: Tensor, n_head: int, dropout_p: float) -> Made | str:
    attention = sdpa.choice(qkv, n_head, dropout_p)
    if attention is None:
        return "SDPA has no fused dropout on a CPU"
    run = Launchers(
        aten.norm, aten.add_norm, aten.norm_backward, aten.linear_gelu, aten.gelu_dgrad,
        attention.packed_forward, attention.packed_backward,
    )  # fmt: skip
    return aten.unsupported((qkv,)) or (run, aten.add_rows_, aten.cross_entropy_)


def _kernels(qkv: Tensor, n_head: int, dropout_p: float) -> Made | str:
    C = qkv.shape[-1] // 3
    norm = backend.explain("add_layer_norm", ops.why_not, (qkv,), dict(width=C))
    mlp = backend.explain("mlp", ops.why_not, (qkv,), {})
    for part, choice in (("add_layer_norm", norm), ("mlp", mlp)):
        if choice.implementation == "torch":
            return f"{part} runs in torch: {choice.reason}"
    attend = _attention(qkv, n_head, dropout_p)
    if isinstance(attend, str):
        return attend

    from fastgpt.kernels import cross_entropy, embedding, gelu_mlp, gemm_gelu, layer_norm

    own = mlp.implementation == "triton"
    gemms = gelu_mlp.Gemms(gemm_gelu.forward, gemm_gelu.dgrad) if own else gelu_mlp.CUBLAS
    run = Launchers(
        layer_norm.forward, layer_norm.add_forward, layer_norm.backward,
        gemms.forward, gemms.dgrad, *attend,
    )  # fmt: skip
    return run, embedding.add_rows_, cross_entropy.cross_entropy_


def _attention(qkv: Tensor, n_head: int, dropout_p: float) -> Attention | str:
    """The forward and backward of the attention that the table chose, or why they cannot be had."""
    op, facts = "packed_causal_attention", dict(head_dim=qkv.shape[-1] // 3 // n_head)
    name, reason = backend.explain(op, ops.why_not, (qkv,), dict(facts, dropout_p=dropout_p))
    if name == "triton":
        from fastgpt.kernels import attention

        return attention.seeded_forward, attention.seeded_backward
    held = sdpa.choice(qkv, n_head, dropout_p) if name == "torch" else getattr(sdpa, name, None)
    if held is None:
        return f"{op} runs in {name}: {reason}"
    return held.packed_forward, held.packed_backward
