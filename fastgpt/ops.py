"""The public ops. Each equals its namesake in reference.py and picks its implementation in
backend.py.

Shapes: B batch, T time, C model width, H heads, D head dim, V vocabulary, N rows, K reduction. All
ops are differentiable once in every floating input (`create_graph=True` raises where a kernel
runs), take any strides on inputs and on the incoming gradient, and write to neither. Under
autocast, matmuls and attention run in the low precision, LayerNorm and the loss in fp32, as
PyTorch's own do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, reference
from fastgpt.fused.embedding import LinearCrossEntropy


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) / sqrt(var + eps) * weight + bias.

    x (..., C), weight and bias (C,) -> (..., C) in x's dtype; statistics in fp32. Equals
    F.layer_norm.
    """
    _check_tensors(x=x, weight=weight, bias=bias)
    C = _width("x", x)
    _check_shape("weight", weight, C)
    _check_shape("bias", bias, C)
    return _pick("layer_norm", x, weight, bias, width=C).layer_norm(x, weight, bias, eps)


def add_layer_norm(
    delta: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """One pass over memory for `total = delta + residual` and its LayerNorm.

    delta, residual (..., C), weight and bias (C,) -> (normed, total), both (..., C). `total` is
    rounded to the promoted dtype of its terms before it is normalised, as the two separate ops
    would.
    """
    _check_tensors(delta=delta, residual=residual, weight=weight, bias=bias)
    C = _width("delta", delta)
    _check_shape("residual", residual, *delta.shape)
    _check_shape("weight", weight, C)
    _check_shape("bias", bias, C)
    picked = _pick("add_layer_norm", delta, residual, weight, bias, width=C)
    return picked.add_layer_norm(delta, residual, weight, bias, eps)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    approximate: str = "none",
    *,
    recompute: bool = False,
) -> Tensor:
    """gelu(x @ weight.T + bias), exact (erf) for approximate="none", OpenAI's for "tanh".

    x (..., K), weight (N, K), bias (N,) -> (..., N). Kernels keep the pre-activation for the
    backward, or compute it again there (`recompute`); dGELU and the bias gradient are one pass.
    """
    _check_approximate(approximate)
    _check_tensors(x=x, weight=weight, bias=bias)
    _check_shape("weight", weight, weight.shape[0], _width("x", x))
    _check_shape("bias", bias, weight.shape[0])
    if backend.casts_once(x):
        return reference.linear_gelu(x, weight, bias, approximate)
    x, weight, bias = _autocast(x, weight, bias)
    picked = _pick("linear_gelu", x, weight, bias)
    if picked is reference:  # which leaves what to keep to autograd
        return picked.linear_gelu(x, weight, bias, approximate)
    return picked.linear_gelu(x, weight, bias, approximate, recompute)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "none",
    *,
    recompute: bool = False,
) -> Tensor:
    """GPT-2's MLP: gelu(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias.

    x (..., C), fc_weight (4C, C), proj_weight (C, 4C) -> (..., C); any hidden width. Kernels keep
    x and the pre-activation, with `recompute` x alone; the activation itself is never stored.
    """
    _check_approximate(approximate)
    _check_tensors(
        x=x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight, proj_bias=proj_bias
    )
    _check_shape("fc_weight", fc_weight, fc_weight.shape[0], _width("x", x))
    _check_shape("fc_bias", fc_bias, fc_weight.shape[0])
    _check_shape("proj_weight", proj_weight, proj_weight.shape[0], fc_weight.shape[0])
    _check_shape("proj_bias", proj_bias, proj_weight.shape[0])
    given = x, fc_weight, fc_bias, proj_weight, proj_bias
    if backend.casts_once(x):
        return reference.mlp(*given, approximate)
    args = _autocast(*given)
    picked = _pick("mlp", *args)
    if picked is reference:  # which leaves what to keep to autograd
        return picked.mlp(*args, approximate)
    return picked.mlp(*args, approximate, recompute)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale * q @ k.T + causal mask) @ v, without the (T, T) matrix in memory.

    q, k, v (B, H, T, D) -> (B, H, T, D); scale defaults to 1/sqrt(D). Softmax and accumulators in
    fp32. Dropout draws its seed from PyTorch's generator: its mask is replayed by a recompute under
    the same RNG state and differs from SDPA's. Equals
    F.scaled_dot_product_attention(is_causal=True).
    """
    _check_dropout(dropout_p)
    _check_tensors(q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"q is {tuple(q.shape)}, it must be (B, H, T, D)")
    q, k, v = _autocast(q, k, v)
    picked = _pick("causal_attention", q, k, v, head_dim=q.shape[-1], dropout_p=dropout_p)
    return picked.causal_attention(q, k, v, dropout_p, scale)


def packed_causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """Causal attention on the QKV projection's output, by strides: no split, no transposes.

    qkv (B, T, 3C) holds q, k, v side by side, each with heads side by side -> (B, T, C). The
    gradient is one (B, T, 3C) tensor, written in place by the backward kernels.
    """
    _check_dropout(dropout_p)
    _check_tensors(qkv=qkv)
    if n_head < 1 or qkv.dim() != 3 or qkv.shape[-1] % (3 * n_head):
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}, it must be (B, T, 3C) with C a multiple of n_head={n_head}"
        )
    (qkv,) = _autocast(qkv)
    head_dim = qkv.shape[-1] // (3 * n_head)
    picked = _pick("packed_causal_attention", qkv, head_dim=head_dim, dropout_p=dropout_p)
    return picked.packed_causal_attention(qkv, n_head, dropout_p)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Mean over the counted rows of logsumexp(logits) - logits[target], in fp32.

    logits (N, V), targets (N,) int64 or uint8 -> fp32 scalar, float64 for float64 logits. Rows
    whose target is `ignore_index` count neither in the sum nor in the mean; if all are ignored the
    mean is NaN and the gradient 0. A target outside [0, V) raises IndexError on a CPU; on CUDA it
    is never read out of bounds.
    """
    _check_tensors(logits=logits, targets=targets)
    if logits.dim() != 2:
        raise ValueError(f"logits are {tuple(logits.shape)}, they must be (N, V)")
    targets = _checked_targets(targets, logits.shape[0])
    picked = _pick("cross_entropy", logits, targets)
    try:
        return picked.cross_entropy(logits, targets, ignore_index)
    except IndexError as error:
        raise _explained(error, logits.shape[-1], ignore_index) from None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1
) -> Tensor:
    """cross_entropy(x @ weight.T, targets), with the logits never kept.

    x (N, C), weight (V, C), targets (N,) as there -> fp32 scalar. The logits exist once, in x's
    dtype, or in chunks where they would take more than 2 GiB, and become their own gradient in one
    pass; softmax, loss and the accumulated weight gradient are fp32. All else is cross_entropy's.
    """
    _check_tensors(x=x, weight=weight, targets=targets)
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}, it must be (N, C)")
    _check_shape("weight", weight, weight.shape[0], x.shape[1])
    targets = _checked_targets(targets, x.shape[0])
    op, dtype = "linear_cross_entropy", autocast_dtype(x)
    implementation = backend.choose(op, why_not, (x, weight, targets), {})
    if implementation == "torch" or dtype != autocast_dtype(weight):  # which linear refuses
        return cross_entropy(torch.nn.functional.linear(x, weight), targets, ignore_index)
    in_place, low = _load(op, implementation).cross_entropy_, weight.detach().to(dtype)
    return in_place_loss(in_place, x, weight, low, targets, ignore_index)


def in_place_loss(
    cross_entropy_: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    targets: Tensor,
    ignore_index: int,
) -> Tensor:
    """linear_cross_entropy of x and weight that fit, by one of the in-place implementations.

    `low` is weight as the matmuls read it.
    """
    _check_tensors(x=x, targets=targets)
    targets = _checked_targets(targets, x.shape[0])
    if autocast_dtype(x) != low.dtype:  # as after a replaced norm, and for linear to refuse
        return cross_entropy(torch.nn.functional.linear(x, weight), targets, ignore_index)
    x = x.to(low.dtype)
    apply = LinearCrossEntropy.apply
    try:
        return apply(cross_entropy_, x, weight, low, targets, ignore_index)
    except IndexError as error:
        raise _explained(error, weight.shape[0], ignore_index) from None


def _pick(op: str, *tensors: Tensor | None, **facts: Any) -> Any:
    """The module whose function called `op` will run on these tensors."""
    given = tuple(t for t in tensors if t is not None)
    return _load(op, backend.choose(op, why_not, given, facts))


def _load(op: str, implementation: str) -> Any:
    """The module of an implementation. Written as imports, which torch.compile can trace."""
    module: Any = reference
    if implementation in ("cudnn", "flash"):
        from fastgpt.implementations import sdpa

        module = getattr(sdpa, implementation)
    elif implementation == "flash-attn":
        from fastgpt.implementations import flash_attn as module
    elif implementation == "aten":
        from fastgpt.implementations import aten as module
    elif implementation == "cublas":
        from fastgpt.kernels import gelu_mlp as module
    elif implementation == "triton":
        if "layer_norm" in op:
            from fastgpt.kernels import layer_norm as module
        elif "attention" in op:
            from fastgpt.kernels import attention as module
        elif op == "adamw":
            from fastgpt.kernels import adamw as module
        elif "cross_entropy" in op:
            from fastgpt.kernels import cross_entropy as module
        else:
            from fastgpt.kernels import gemm_gelu as module
    return module


def why_not(
    op: str, implementation: str, tensors: tuple[Tensor, ...], facts: Mapping[str, Any]
) -> str | None:
    """Why this implementation cannot run here, or None. Imports the kernels, which need triton."""
    try:
        module = _load(op, implementation)
    except Exception as error:  # a broken install raises anything, not only ImportError
        return f"importing it failed: {type(error).__name__}: {error}"
    return module.unsupported(tensors, **facts)


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which autocast hands t to a matmul; its own where autocast is off."""
    if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return t.dtype  # float64, which autocast leaves alone
    return torch.get_autocast_dtype(t.device.type) if backend.autocasts(t) else t.dtype


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast hands them to a matmul."""
    first = next(t for t in tensors if t is not None)
    if not backend.kernels_possible(first):
        return tensors  # PyTorch casts by itself, and remembers a weight's cast
    return tuple(t if t is None else t.to(autocast_dtype(t)) for t in tensors)


def _width(name: str, t: Tensor) -> int:
    if t.dim() == 0:
        raise ValueError(f"{name} is a scalar; it needs at least one dimension")
    return t.shape[-1]


def _check_tensors(**tensors: Tensor | None) -> None:
    """What PyTorch would refuse obscurely, or not at all: its linear on a CPU takes a weight on the
    meta device and returns noise.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first, home = next(iter(given.items()))
    for name, t in given.items():
        if t.is_nested and t.layout == torch.strided:
            raise TypeError(f"{name} is a nested tensor; convert with .to_padded_tensor(0.0)")
        if name != "targets" and not t.is_floating_point():
            raise TypeError(
                f"{name} is {t.dtype}, it must be floating point; convert with .float()"
            )
        if t.device != home.device:
            raise RuntimeError(
                f"{name} is on {t.device}, {first} is on {home.device}; move them with .to()"
            )


def _check_shape(name: str, t: Tensor | None, *expected: int) -> None:
    """A kernel trusts its shapes: a wrong one would be read out of bounds."""
    if t is not None and t.shape != expected:
        raise ValueError(f"{name} is {tuple(t.shape)}, it must be {expected} to fit the others")


def _checked_targets(targets: Tensor, N: int) -> Tensor:
    """targets (N,) in int64; uint8 is what F.cross_entropy takes beside it."""
    _check_shape("targets", targets, N)
    if targets.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"targets must be int64, got {targets.dtype}; convert with .long()")
    return targets.long()


def _explained(error: IndexError, V: int, ignore_index: int) -> IndexError:
    """PyTorch says which target is wrong, but not what would be right."""
    allowed = f"Targets must lie in [0, {V}), the vocabulary, or be ignore_index={ignore_index}"
    return IndexError(f"{error} {allowed}")


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"unknown GELU approximate={approximate!r}; use 'none' (erf) or 'tanh'")


def _check_dropout(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p={p} is no probability; use a value in [0, 1]")
