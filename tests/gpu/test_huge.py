"""Beyond 2**31 elements, where a 32-bit offset wraps around, and contexts of 16384 tokens.

An op sees a tensor of which all but the last rows are zeros (or ignored), and whose incoming
gradient is zero there: what it computes for the last rows is then what it computes for those alone,
which float64 can afford. A grid has more than 65,535 programs at these sizes, the limit of its
y and z axes; that of attention over many heads is in test_attention.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastgpt import ops, reference
from fastgpt.kernels import attention, mlp
from tests.close import DEVICE, assert_as_accurate, randn
from tests.gpu.here import HALF, needs_gpu, needs_memory, size

pytestmark = needs_gpu
LIMIT = size(2**31, 4000)
ONE = torch.ones((), device=DEVICE)
LAST = 3  # rows, or sequences, that are looked at
N = size(4096, 40)  # the wide side of a matrix
C = size(768, 24)
V = size(16384, 97)
H, T, D = size((16, 64, 64), (2, 5, 16))


def in_the_last_rows(op: Callable, rows: int, count: int) -> Callable:
    """op, whose first `count` arguments become the last of `rows` rows."""

    def extended(t: Tensor) -> Tensor:
        rest = t.new_full((rows - LAST, *t.shape[1:]), 0 if t.is_floating_point() else -1)
        return torch.cat([rest, t])

    def embedded(*args: Tensor):
        out = op(*map(extended, args[:count]), *args[count:])
        if isinstance(out, tuple):
            return tuple(t[-LAST:] for t in out)
        return out[-LAST:] if out.dim() else out

    return embedded


class Huge(NamedTuple):
    op: str
    ours: Callable
    ref: Callable
    inputs: Callable[[], list[Tensor]]
    of_rows: int  # how many inputs have a row each; the others are weights
    grads: list[tuple[int, ...]]  # shapes; none for a loss
    width: int  # elements of the largest tensor's row
    copies: int  # of that tensor, alive at once


def layer(K: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """Weight and bias whose outputs are about N(0, 1), where GELU bends."""
    return [randn(N, K, dtype=dtype, scale=K**-0.5), randn(N, dtype=dtype)]


def rows_of(*shape: int) -> Tensor:
    return randn(LAST, *shape, dtype=HALF)


def gelu_cases(name: str, module) -> dict[str, Huge]:
    K = 16
    linear = module.linear_gelu, reference.linear_gelu
    return {
        f"linear_gelu to wide rows, {name} GEMM": Huge(
            "linear_gelu", *linear, lambda: [rows_of(K), *layer(K, N, HALF)], 1, [(LAST, N)], N, 7
        ),
        f"linear_gelu of wide rows, {name} GEMM": Huge(
            "linear_gelu", *linear, lambda: [rows_of(N), *layer(N, K, HALF)], 1, [(LAST, K)], N, 5
        ),
        f"mlp, {name} GEMM": Huge(
            "mlp", module.mlp, reference.mlp,
            lambda: [rows_of(K), *layer(K, N, HALF), *layer(N, K, HALF)], 1, [(LAST, K)], N, 8,
        ),
    }  # fmt: skip


HUGE = {
    "layer_norm": Huge(
        "layer_norm", ops.layer_norm, reference.layer_norm,
        lambda: [rows_of(C), randn(C, dtype=HALF), randn(C, dtype=HALF)], 1, [(LAST, C)], C, 6,
    ),
    "add_layer_norm": Huge(
        "add_layer_norm", ops.add_layer_norm, reference.add_layer_norm,
        lambda: [rows_of(C), rows_of(C), randn(C, dtype=HALF), randn(C, dtype=HALF)],
        2, [(LAST, C), (LAST, C)], C, 10,
    ),
    **gelu_cases("cuBLAS", mlp.cublas),
    **gelu_cases("Triton", mlp.own),
    "causal_attention": Huge(
        "causal_attention", ops.causal_attention, reference.causal_attention,
        lambda: [rows_of(H, T, D) for _ in range(3)], 3, [(LAST, H, T, D)], H * T * D, 11,
    ),
    "packed_causal_attention": Huge(
        "packed_causal_attention", functools.partial(ops.packed_causal_attention, n_head=H),
        functools.partial(reference.packed_causal_attention, n_head=H),
        lambda: [rows_of(T, 3 * H * D)], 1, [(LAST, T, H * D)], 3 * H * T * D, 5,
    ),
    "cross_entropy": Huge(
        "cross_entropy", ops.cross_entropy, reference.cross_entropy,
        lambda: [rows_of(V), torch.randint(V, (LAST,), device=DEVICE)], 2, [], V, 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.ops(HUGE[name].op)) for name in HUGE]
)
def test_the_last_rows_beyond_32_bits(name):
    case = HUGE[name]
    rows = LIMIT // case.width + 2 * LAST
    assert (rows - LAST) * case.width > LIMIT
    needs_memory(case.copies * rows * case.width * HALF.itemsize / 2**30)
    ours = in_the_last_rows(case.ours, rows, case.of_rows)
    grads = [randn(*shape, dtype=HALF) for shape in case.grads] or [ONE]
    assert_as_accurate(ours, case.ref, *case.inputs(), grads=grads)


@pytest.mark.ops("packed_causal_attention")
def test_time_strides_beyond_32_bits():
    """One sequence whose tokens lie far apart: row * stride overflows within a head."""
    tokens = size(1025, 20)
    stride = LIMIT // (tokens - 2) + 8
    needs_memory(3 * tokens * stride * HALF.itemsize / 2**30)

    def apart(*shape: int) -> Tensor:
        wide = torch.empty(1, tokens, stride, device=DEVICE, dtype=HALF)
        return wide[..., : shape[-1]].copy_(randn(*shape, dtype=HALF))

    qkv, grad = apart(1, tokens, 3 * 32), apart(1, tokens, 32)
    assert (tokens - 1) * qkv.stride(1) > LIMIT

    def ref(qkv: Tensor) -> Tensor:
        """Of dense tensors, forward and backward: cuDNN refuses such strides."""
        return reference.packed_causal_attention(1 * qkv, n_head=2) * 1

    ours = functools.partial(ops.packed_causal_attention, n_head=2)
    assert_as_accurate(ours, ref, qkv, grads=[grad])


@pytest.mark.ops("causal_attention", "packed_causal_attention")
def test_dropout_mask_beyond_32_bits():
    """The last head's mask is written, with its share of kept scores, and is no other head's."""
    length, p = size(1024, 128), 0.25
    heads = LIMIT // length**2 + 2
    needs_memory(2 * heads * length**2 / 2**30)
    seed = torch.tensor([1234567890123], device=DEVICE)
    mask = attention.dropout_mask(seed, 1, heads, length, p)[0]
    share, deviation = mask[-1].double().mean().item(), (p * (1 - p)) ** 0.5 / length
    assert abs(share - (1 - p)) < 5 * deviation
    assert not any(torch.equal(mask[-1], mask[i]) for i in (0, heads - 2))


@pytest.mark.ops("causal_attention")
@pytest.mark.parametrize("length", size((16383, 16384), (70,)))
def test_long_contexts(length):
    """Every row, although float64 needs the (T, T) matrix for that."""
    heads = 2
    needs_memory(10 * heads * length**2 * 8 / 2**30)
    args = [randn(1, heads, length, 64, dtype=HALF) for _ in range(3)]
    grads = [randn(1, heads, length, 64, dtype=HALF)]
    assert_as_accurate(ops.causal_attention, reference.causal_attention, *args, grads=grads)
