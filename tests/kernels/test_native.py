"""native.c, attention and GELU on a CPU, against float64 by the rule of the kernels."""

import functools
import shutil

import pytest
import torch

from fastgpt import reference
from fastgpt.implementations import native, sdpa
from tests.close import DEVICE, LAYOUTS, assert_as_accurate, randn

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not shutil.which("cc"), reason="it is C for CPUs"
)
DTYPES = [torch.float32, torch.bfloat16]
# B, H, T, D: around the 32 rows of a block of queries, and the 16 to 32 columns of a tile
SHAPES = [(2, 1, 37, 16), (1, 2, 129, 24), (2, 2, 64, 32), (1, 3, 31, 64), (1, 2, 33, 80),
          (2, 1, 1, 5), (1, 1, 96, 1)]  # fmt: skip


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head):
        y, (lse,) = native.attention(qkv, n_head, 0.0)
        ctx.save_for_backward(qkv, y, lse)
        ctx.n_head = n_head
        return y

    @staticmethod
    def backward(ctx, dy):
        qkv, y, lse = ctx.saved_tensors
        return native.attention_backward(dy, qkv, y, (lse,), ctx.n_head, 0.0), None


class Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, proj):
        slope, y = native.linear_gelu(x, w, b, False)
        ctx.save_for_backward(x, w, slope, y, proj)
        return y @ proj.t()

    @staticmethod
    def backward(ctx, dm):
        x, w, slope, y, proj = ctx.saved_tensors
        dh, _, db = native.gelu_dgrad(dm, proj, slope, False, True, False)
        return dh @ w, dh.t() @ x, db, dm.t() @ y


def held(qkv, n_head):
    return Attention.apply(qkv, n_head)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H, T, D", SHAPES)
def test_attention(B, H, T, D, dtype):
    qkv, grads = randn(B, T, 3 * H * D, dtype=dtype), [randn(B, T, H * D, dtype=dtype)]
    ours = functools.partial(held, n_head=H)
    ref = functools.partial(reference.packed_causal_attention, n_head=H)
    assert_as_accurate(ours, ref, qkv, grads=grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    qkv, grads = LAYOUTS[layout](randn(2, 19, 144)), [LAYOUTS[layout](randn(2, 19, 48))]
    ours = functools.partial(held, n_head=2)
    ref = functools.partial(reference.packed_causal_attention, n_head=2)
    assert_as_accurate(ours, ref, qkv, grads=grads)


def test_large_scores():
    """Of some hundreds, whose exponentials overflow unless the largest is taken off; a rounding of
    such a score is hundreds of roundings of its probability.
    """
    qkv = randn(1, 70, 3 * 16)
    qkv[..., :16] *= 20
    qkv[..., 16:32] *= 5
    ours = functools.partial(held, n_head=1)
    ref = functools.partial(reference.packed_causal_attention, n_head=1)
    assert_as_accurate(ours, ref, qkv, grads=[randn(1, 70, 16)], budget=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_future_never_leaks_and_nan_is_not_swallowed(dtype):
    qkv = randn(1, 70, 96, dtype=dtype)
    clean, _ = native.attention(qkv, 2, 0.0)
    qkv[:, 33:, :64] = float("nan")
    qkv[:, 33:, 64:] = 1e30
    poisoned, _ = native.attention(qkv, 2, 0.0)
    assert torch.equal(poisoned[:, :33], clean[:, :33])
    assert poisoned[:, 33:].isnan().all()


def test_where_there_is_no_compiler():
    """SDPA's backward takes short bf16 in fp32."""
    qkv, dy = randn(2, 40, 96, dtype=torch.bfloat16), randn(2, 40, 32, dtype=torch.bfloat16)
    y, state = sdpa.cpu.packed_forward(qkv, 2, 0.0)
    found = sdpa.cpu.packed_backward(dy, qkv, y, state, 2, 0.0)
    exact = qkv.double().requires_grad_()
    reference.packed_causal_attention(exact, 2).backward(dy.double())
    assert found.dtype == torch.bfloat16
    top = exact.grad.abs().max()
    assert (found.double() - exact.grad).abs().max() < 2 * torch.finfo(found.dtype).eps * top


def test_threads_change_no_bit():
    qkv, dy = randn(3, 50, 96), randn(3, 50, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, state = native.attention(qkv, 2, 0.0)
            found.append((y, native.attention_backward(dy, qkv, y, state, 2, 0.0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, N", [(37, 24, 19), (1, 8, 5), (64, 16, 1024)])
def test_mlp(M, K, N, dtype):
    shapes = (M, K), (N, K), (N,), (K, N)
    assert_as_accurate(
        Mlp.apply,
        lambda x, w, b, proj: reference.mlp(x, w, b, proj, None),
        *(randn(*shape, dtype=dtype) for shape in shapes),
        grads=[randn(M, K, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_everywhere(approximate, dtype):
    """Value and slope on a grid, at both zeros, and at what is no number."""
    h = torch.cat([torch.linspace(-40, 40, 20001), torch.tensor([0.0, -0.0])]).to(dtype)[:, None]
    one, zero = torch.ones(1, 1, dtype=dtype), None
    slope, y = native.linear_gelu(h, one, zero, approximate == "tanh")
    exact = h.double().requires_grad_()
    truth = torch.nn.functional.gelu(exact, approximate=approximate)
    (true_slope,) = torch.autograd.grad(truth.sum(), exact)
    eps = torch.finfo(dtype).eps
    for a, b in ((y, truth), (slope, true_slope)):
        off = (a.double() - b).abs()
        assert (off <= 4 * eps * b.abs().clamp(min=2**-2)).all(), off.max()
        if dtype == torch.bfloat16:  # rounded to nearest, where not far into a tail
            assert (a != b.to(dtype))[h.abs() < 3].double().mean() < 0.01
    odd = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]], dtype=dtype)
    slope, y = native.linear_gelu(odd, one, zero, approximate == "tanh")
    assert y[0] == float("inf") and y[1:].isnan().all() and slope[2].isnan()
