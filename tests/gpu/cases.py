"""Every op with inputs of given sizes: what the GPU suite repeats, compares and sanitises."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops, reference
from fastgpt.kernels import mlp
from tests.close import DEVICE, evaluate, randn


class Sizes(NamedTuple):
    B: int
    T: int
    C: int
    H: int
    V: int


GPT2 = Sizes(2, 1024, 768, 12, 50304)
SMALL = Sizes(1, 17, 48, 3, 97)  # no power of two


class Case(NamedTuple):
    ours: Callable
    ref: Callable
    inputs: list[Tensor | None]
    grads: list[Tensor]

    def run(self) -> list[Tensor]:
        """Outputs and gradients of ours, dropping the same scores every time."""
        torch.manual_seed(1)
        outputs, gradients = evaluate(self.ours, self.inputs, self.grads, None)
        return [t.detach() for t in outputs] + gradients


def _case(name: str, inputs: list[Tensor | None], grads: list[Tensor], **options: Any) -> Case:
    ours, ref = (functools.partial(getattr(m, name), **options) for m in (ops, reference))
    return Case(ours, ref, inputs, grads)


def _layer_norm(s: Sizes, dtype: torch.dtype) -> Case:
    rows, C = s.B * s.T, s.C
    inputs = [randn(rows, C, dtype=dtype), randn(C, dtype=dtype), randn(C, dtype=dtype)]
    return _case("layer_norm", inputs, [randn(rows, C, dtype=dtype)])


def _add_layer_norm(s: Sizes, dtype: torch.dtype) -> Case:
    """As under autocast: a low-precision branch on the fp32 residual stream."""
    rows, C = s.B * s.T, s.C
    inputs = [randn(rows, C, dtype=dtype), randn(rows, C), randn(C), randn(C)]
    return _case("add_layer_norm", inputs, [randn(rows, C), randn(rows, C)])


def layer(K: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """Weight and bias whose outputs are about N(0, 1), where GELU bends."""
    return [randn(N, K, dtype=dtype, scale=K**-0.5), randn(N, dtype=dtype)]


def _linear_gelu(module: Any, s: Sizes, dtype: torch.dtype) -> Case:
    rows, C = s.B * s.T, s.C
    inputs = [randn(rows, C, dtype=dtype), *layer(C, 4 * C, dtype)]
    grads = [randn(rows, 4 * C, dtype=dtype)]
    return Case(module.linear_gelu, reference.linear_gelu, inputs, grads)


def _mlp(module: Any, s: Sizes, dtype: torch.dtype) -> Case:
    rows, C = s.B * s.T, s.C
    inputs = [randn(rows, C, dtype=dtype), *layer(C, 4 * C, dtype), *layer(4 * C, C, dtype)]
    return Case(module.mlp, reference.mlp, inputs, [randn(rows, C, dtype=dtype)])


def _attention(s: Sizes, dtype: torch.dtype) -> Case:
    shape = s.B, s.H, s.T, s.C // s.H
    inputs = [randn(*shape, dtype=dtype) for _ in range(3)]
    return _case("causal_attention", inputs, [randn(*shape, dtype=dtype)])


def _packed(s: Sizes, dtype: torch.dtype, dropout_p: float = 0.0) -> Case:
    inputs = [randn(s.B, s.T, 3 * s.C, dtype=dtype)]
    grads = [randn(s.B, s.T, s.C, dtype=dtype)]
    return _case("packed_causal_attention", inputs, grads, n_head=s.H, dropout_p=dropout_p)


def _cross_entropy(s: Sizes, dtype: torch.dtype) -> Case:
    logits = randn(s.B * s.T, s.V, dtype=dtype)
    return _case("cross_entropy", [logits, _targets(s)], [torch.ones((), device=DEVICE)])


def _linear_cross_entropy(s: Sizes, dtype: torch.dtype) -> Case:
    x, (w, _) = randn(s.B * s.T, s.C, dtype=dtype), layer(s.C, s.V, dtype)
    return _case("linear_cross_entropy", [x, w, _targets(s)], [torch.ones((), device=DEVICE)])


def _targets(s: Sizes) -> Tensor:
    targets = torch.randint(s.V, (s.B * s.T,), device=DEVICE)
    targets[::7] = -1
    return targets


CASES: dict[str, Callable[[Sizes, torch.dtype], Case]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "linear_gelu, cuBLAS GEMM": functools.partial(_linear_gelu, mlp.cublas),
    "linear_gelu, Triton GEMM": functools.partial(_linear_gelu, mlp.own),
    "mlp, cuBLAS GEMM": functools.partial(_mlp, mlp.cublas),
    "mlp, Triton GEMM": functools.partial(_mlp, mlp.own),
    "causal_attention": _attention,
    "packed_causal_attention": _packed,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
DROPOUT = {  # PyTorch draws another mask, so there is nothing to compare with
    "packed_causal_attention, dropout": functools.partial(_packed, dropout_p=0.1)
}
