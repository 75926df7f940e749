"""The public ops. Each equals its namesake in reference.py and picks its implementation in
backend.py.

Shapes: B batch, T time, C model width, H heads, D head dim, V vocabulary, N rows, K reduction. All
ops are differentiable once in every floating input (`create_graph=True` raises where a kernel
runs), take any strides on inputs and on the incoming gradient, and write to neither. Under
autocast, matmuls and attention run in the low precision, LayerNorm and the loss in fp32, as
PyTorch's own do.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, reference
from fastgpt.linear_cross_entropy import mean_loss, with_limits


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) / sqrt(var + eps) * weight + bias.

    x (..., C), weight and bias (C,) -> (..., C) in x's dtype; statistics in fp32. Equals
    F.layer_norm.
    """
    _check_tensors(x=x, weight=weight, bias=bias)
    C = _width("x", x)
    _check_shape("weight", weight, C)
    _check_shape("bias", bias, C)
    return backend.choose("layer_norm", x, weight, bias, width=C).layer_norm(x, weight, bias, eps)


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
    picked = backend.choose("add_layer_norm", delta, residual, weight, bias, width=C)
    return picked.add_layer_norm(delta, residual, weight, bias, eps)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    """gelu(x @ weight.T + bias), exact (erf) for approximate="none", OpenAI's for "tanh".

    x (..., K), weight (N, K), bias (N,) -> (..., N). Kernels keep the pre-activation for the
    backward; dGELU and the bias gradient are one pass.
    """
    _check_approximate(approximate)
    _check_tensors(x=x, weight=weight, bias=bias)
    _check_shape("weight", weight, weight.shape[0], _width("x", x))
    _check_shape("bias", bias, weight.shape[0])
    if backend.casts_once(x):
        return reference.linear_gelu(x, weight, bias, approximate)
    x, weight, bias = _autocast(x, weight, bias)
    return backend.choose("linear_gelu", x, weight, bias).linear_gelu(x, weight, bias, approximate)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "none",
) -> Tensor:
    """GPT-2's MLP: gelu(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias.

    x (..., C), fc_weight (4C, C), proj_weight (C, 4C) -> (..., C); any hidden width. Kernels keep
    x and the pre-activation; the activation itself is never stored.
    """
    _check_approximate(approximate)
    _check_tensors(
        x=x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight, proj_bias=proj_bias
    )
    _check_shape("fc_weight", fc_weight, fc_weight.shape[0], _width("x", x))
    _check_shape("fc_bias", fc_bias, fc_weight.shape[0])
    _check_shape("proj_weight", proj_weight, proj_weight.shape[0], fc_weight.shape[0])
    _check_shape("proj_bias", proj_bias, proj_weight.shape[0])
    inputs = x, fc_weight, fc_bias, proj_weight, proj_bias
    if backend.casts_once(x):
        return reference.mlp(*inputs, approximate)
    args = _autocast(*inputs)
    return backend.choose("mlp", *args).mlp(*args, approximate)


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
    picked = backend.choose("causal_attention", q, k, v, head_dim=q.shape[-1], dropout_p=dropout_p)
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
    picked = backend.choose("packed_causal_attention", qkv, head_dim=head_dim, dropout_p=dropout_p)
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
    targets = checked_targets(logits, targets)
    picked = backend.choose("cross_entropy", logits, targets)
    try:
        return picked.cross_entropy(logits, targets, ignore_index)
    except IndexError as error:
        raise with_limits(error, logits.shape[-1], ignore_index) from None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1
) -> Tensor:
    """cross_entropy(x @ weight.T, targets), with the logits never kept.

    x (N, C), weight (V, C), targets (N,) as there -> fp32 scalar. The logits exist once, in x's
    dtype, or in chunks where they would take more than 2 GiB (256 MiB on a CPU), and become their
    own gradient in one pass; softmax, loss and the accumulated weight gradient are fp32. All else
    is cross_entropy's.
    """
    _check_tensors(x=x, weight=weight, targets=targets)
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}, it must be (N, C)")
    _check_shape("weight", weight, weight.shape[0], x.shape[1])
    targets = checked_targets(x, targets)
    chosen = backend.choose("linear_cross_entropy", x, weight, targets)
    dtype = autocast_dtype(x)
    # what works in place is no operator that torch.compile could keep whole; cross_entropy is.
    # linear refuses two dtypes
    torchs = chosen is reference or torch.compiler.is_compiling() or dtype != autocast_dtype(weight)
    if torchs:
        return cross_entropy(torch.nn.functional.linear(x, weight), targets, ignore_index)
    low = weight.detach().to(dtype)
    return mean_loss(chosen.cross_entropy_, x.to(dtype), weight, low, targets, ignore_index)


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
    operands = {name: t for name, t in tensors.items() if t is not None}
    first, home = next(iter(operands.items()))
    for name, t in operands.items():
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


def checked_targets(x: Tensor, targets: Tensor) -> Tensor:
    """targets (N,) of x (N, ...) in int64; uint8 is what F.cross_entropy takes beside it."""
    _check_tensors(x=x, targets=targets)
    _check_shape("targets", targets, x.shape[0])
    if targets.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"targets must be int64, got {targets.dtype}; convert with .long()")
    return targets.long()


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"unknown GELU approximate={approximate!r}; use 'none' (erf) or 'tanh'")


def _check_dropout(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p={p} is no probability; use a value in [0, 1]")
