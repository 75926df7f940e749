"""What the fused units are made of: our kernels around cuBLAS on CUDA; on a CPU PyTorch's ops, and
attention and GELU in C where there is a compiler.

A launcher is a function on tensors without autograd; the units (block.py, embedding.py,
linear_cross_entropy.py) own the backward. Both sets take the same arguments and give the same
results, so that a unit does not know which set it calls.

    backend.OPS["block"] -> of_kernels, of_aten      OPS["compiled"] -> of_operators
    a BlockImplementation -> why not, or the Launchers for such qkv
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import backend
from fastgpt.implementations import aten, native, sdpa
from fastgpt.implementations.sdpa import State
from fastgpt.linear_cross_entropy import InPlace, Loss, LossBackward

_ATTENTION = "packed_causal_attention"
# The ops inside a block -> the implementations that a fused block can use.
FUSABLE: dict[str, tuple[str, ...]] = {
    "add_layer_norm": ("triton",),
    "mlp": ("triton", "cublas"),
    "packed_causal_attention": ("triton", "torch", "cudnn", "flash", "hybrid"),
}
# ops that a fused GPT replaces besides
STANDS_IN_FOR = ("layer_norm", "linear_gelu", "linear_cross_entropy")

# M rows, N or C columns, K the reduction. A result that was not asked for is None or (0,).
# x, w, b, eps, dtype -> y in dtype; mean, rstd
Norm = Callable[[Tensor, Tensor, Tensor | None, float, torch.dtype], tuple[Tensor, Tensor, Tensor]]
# delta, residual, w, b, eps, dtype -> y in dtype; s = residual + delta; mean, rstd
AddNorm = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, float, torch.dtype],
    tuple[Tensor, Tensor, Tensor, Tensor],
]
# dy, ds_out, s, w, mean, rstd, has_bias, delta_dtype -> ds; the same in delta_dtype; dw; db
NormBackward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, bool, torch.dtype],
    tuple[Tensor, Tensor, Tensor, Tensor | None],
]
# x, w, b, tanh -> h = x @ w.T + b, or what else gelu_dgrad takes for h; gelu(h)
LinearGelu = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor]]
# dy, w, h, tanh, with_bias, with_output -> dh = gelu'(h) * (dy @ w); gelu(h); db
GeluDgrad = Callable[
    [Tensor, Tensor, Tensor, bool, bool, bool], tuple[Tensor, Tensor | None, Tensor | None]
]
# qkv, n_head, dropout_p -> y, state
Attention = Callable[[Tensor, int, float], tuple[Tensor, State]]
# dy, qkv, y, state, n_head, dropout_p -> dqkv
AttentionBackward = Callable[[Tensor, Tensor, Tensor, State, int, float], Tensor]
# table, ids, rows: table[ids[i]] += rows[i]
AddRows = Callable[[Tensor, Tensor, Tensor], None]


class Launchers(NamedTuple):
    norm: Norm
    add_norm: AddNorm
    norm_backward: NormBackward
    linear_gelu: LinearGelu
    gelu_dgrad: GeluDgrad
    attention: Attention
    attention_backward: AttentionBackward
    add_rows_: AddRows
    cross_entropy_: InPlace
    # the loss of logits that are returned, inside torch.compile; elsewhere it is ops.cross_entropy
    cross_entropy: tuple[Loss, LossBackward] | None = None
    keeps_gelu: bool = False  # its output too, where making it again costs more than memory does
    overlaps: bool = False  # weight gradients go on a second stream (second_stream.py)


class PackedAttention(NamedTuple):
    forward: Attention
    backward: AttentionBackward


class BlockImplementation(NamedTuple):
    """An implementation of "block" or "compiled" in backend.OPS.

    Both functions are asked about qkv (B, T, 3C) in the matmuls' dtype, n_head and dropout_p.
    """

    unsupported: Callable[[tuple[Tensor, ...], int, float], str | None]
    launchers: Callable[[Tensor, int, float], Launchers]  # only if `unsupported` gave no reason


def _asked_otherwise() -> str | None:
    """Why use_backend rules out a fused block, or None: it names an implementation that a fused
    block cannot use. That PyTorch is faster at one part alone is no reason.
    """
    for op, names in FUSABLE.items():
        if (asked := backend.asked_for(op)) is not None and asked not in names:
            return f"use_backend asks for {op} in {asked}"
    for op in STANDS_IN_FOR:
        if backend.asked_for(op) == "torch":
            return f"use_backend asks for {op} in torch"
    return None


def _aten_unsupported(tensors: tuple[Tensor, ...], n_head: int, dropout_p: float) -> str | None:
    if sdpa.choice(tensors[0], n_head, dropout_p) is None:
        return "SDPA has no fused dropout on a CPU"
    return _asked_otherwise() or aten.unsupported(tensors)


def _of_aten(qkv: Tensor, n_head: int, dropout_p: float) -> Launchers:
    aten.keep_freed_memory()
    attention = sdpa.choice(qkv, n_head, dropout_p)
    assert attention is not None  # as _aten_unsupported found
    made = Launchers(
        norm=aten.norm,
        add_norm=aten.add_norm,
        norm_backward=aten.norm_backward,
        linear_gelu=aten.linear_gelu,
        gelu_dgrad=aten.gelu_dgrad,
        attention=attention.packed_forward,
        attention_backward=attention.packed_backward,
        add_rows_=aten.add_rows_,
        cross_entropy_=aten.cross_entropy_,
        keeps_gelu=True,
    )
    return made if native.unsupported(qkv, dropout_p) else _in_c(made)


def _in_c(made: Launchers) -> Launchers:
    """The same with native.c for what nobody wants from PyTorch."""
    if backend.asked_for(_ATTENTION) is None:
        made = made._replace(
            attention=native.attention, attention_backward=native.attention_backward
        )
    if backend.asked_for("mlp") is None:
        made = made._replace(linear_gelu=native.linear_gelu, gelu_dgrad=native.gelu_dgrad)
    return made


def _kernels_unsupported(tensors: tuple[Tensor, ...], n_head: int, dropout_p: float) -> str | None:
    if reason := _asked_otherwise():
        return reason
    width = tensors[0].shape[-1] // 3
    needed = {"add_layer_norm": ("triton", dict(width=width)), "mlp": ("cublas", {})}
    for op, (name, facts) in needed.items():
        if problem := backend.why_not(op, name, tensors, facts):
            return f"{op} cannot run: {problem}"
    attention, reason = _attention(tensors[0], n_head, dropout_p)
    return f"{_ATTENTION} runs in {reason}" if attention is None else None


def _of_kernels(qkv: Tensor, n_head: int, dropout_p: float) -> Launchers:
    from fastgpt.kernels import cross_entropy, embedding, gemm_gelu, layer_norm, mlp

    own = backend.explain("mlp", (qkv,), {}).implementation == "triton"
    attention, _ = _attention(qkv, n_head, dropout_p)
    assert attention is not None  # _kernels_unsupported has checked it
    return Launchers(
        norm=layer_norm.forward,
        add_norm=layer_norm.add_forward,
        norm_backward=layer_norm.backward,
        linear_gelu=gemm_gelu.forward if own else mlp.cublas.forward,
        gelu_dgrad=gemm_gelu.dgrad if own else mlp.cublas.dgrad,
        attention=attention.forward,
        attention_backward=attention.backward,
        add_rows_=embedding.add_rows_,
        cross_entropy_=cross_entropy.cross_entropy_,
    )


def _of_operators(qkv: Tensor, n_head: int, dropout_p: float) -> Launchers:
    """The same for torch.compile: kernels as operators in its graph, GEMMs as PyTorch's own."""
    from fastgpt.kernels import _launch, cross_entropy, embedding, gemm_gelu, layer_norm, mlp

    _launch.introduce_to_inductor()
    made = _of_kernels(qkv, n_head, dropout_p)
    gemms = mlp.own if made.linear_gelu is gemm_gelu.forward else mlp.cublas
    return Launchers(
        norm=layer_norm.registered_forward,
        add_norm=layer_norm.registered_add_forward,
        norm_backward=layer_norm.registered_backward,
        linear_gelu=gemms.forward,
        gelu_dgrad=gemms.dgrad,
        attention=made.attention,
        attention_backward=made.attention_backward,
        add_rows_=embedding.registered_add_rows_,
        cross_entropy_=cross_entropy.registered_cross_entropy_,
        cross_entropy=(cross_entropy.registered_forward, cross_entropy.registered_backward),
    )


def _attention(qkv: Tensor, n_head: int, dropout_p: float) -> tuple[PackedAttention | None, str]:
    """The attention that dispatch chooses, or None if its backward cannot be called alone; and its
    name with the reason for the choice.
    """
    head_dim = qkv.shape[-1] // 3 // n_head
    name, reason = backend.explain(_ATTENTION, (qkv,), dict(head_dim=head_dim, dropout_p=dropout_p))
    why = f"{name}: {reason}"
    if name == "triton":
        from fastgpt.kernels import attention

        return PackedAttention(attention.seeded_forward, attention.seeded_backward), why
    held: Any
    if name == "torch":
        held = sdpa.choice(qkv, n_head, dropout_p)
    else:
        held = backend.implementation(_ATTENTION, name)
    if not hasattr(held, "packed_backward"):
        return None, why
    return PackedAttention(held.packed_forward, held.packed_backward), why


of_aten = BlockImplementation(_aten_unsupported, _of_aten)
of_kernels = BlockImplementation(_kernels_unsupported, _of_kernels)
of_operators = BlockImplementation(_kernels_unsupported, _of_operators)
