"""GELU of every 16-bit number, and its gradient: before they are rounded, and after."""

import pytest
import torch
import triton
import triton.language as tl

from fastgpt.kernels._math import gelu_and_grad
from fastgpt.kernels.gelu import gelu_backward, gelu_forward
from tests.close import DEVICE

pytestmark = pytest.mark.ops("linear_gelu", "mlp")

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _gelu_and_grad_kernel(h_ptr, y_ptr, grad_ptr, dtype: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, grad = gelu_and_grad(tl.load(h_ptr + at), False, dtype)
    tl.store(y_ptr + at, y)
    tl.store(grad_ptr + at, grad)


def all_numbers(dtype):
    return torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(dtype)


def before_rounding(dtype):
    """h, and gelu(h) and its gradient in fp32 as kernels for `dtype` have them: also of bf16 in the
    interpreter, which cannot hold bf16 itself.
    """
    h = all_numbers(dtype).float()
    y, grad = torch.empty_like(h), torch.empty_like(h)
    _gelu_and_grad_kernel[(64,)](h, y, grad, DTYPES[dtype], BLOCK=1024)
    finite = h.isfinite()
    return h[finite], y[finite], grad[finite]


def truth(h):
    """Also far below 0, where 1 + erf is 0 in float64 too."""
    h = h.double()
    cdf = torch.special.erfc(-h * 0.5**0.5) / 2
    density = torch.exp(-h * h / 2) / (2 * torch.pi) ** 0.5
    return h * cdf, cdf + (h * density).nan_to_num(0), cdf


def ulp(t, dtype):
    """Of normal numbers of `dtype`."""
    return 2.0 ** (torch.frexp(t.abs())[1] - 1) * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # the interpreter's inf
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_less_than_a_quarter_ulp_is_added_to_rounding(dtype):
    h, y, grad = before_rounding(dtype)
    true_y, true_grad, cdf = truth(h)
    least = torch.finfo(dtype).smallest_normal
    error = (y - true_y).abs() / ulp(true_y, dtype)
    assert error[true_y.abs() >= least].max() < 0.25
    assert ((y - true_y).abs() <= least)[true_y.abs() < least].all()
    # the gradient's terms cancel near -0.75, and are themselves rounded to fp32
    error = ((grad - true_grad).abs() - 2.0**-22 * cdf) / ulp(true_grad, dtype)
    assert error[true_grad.abs() >= 8 * least].max() < 0.25
    assert ((grad - true_grad).abs() <= 8 * least)[true_grad.abs() < 8 * least].all()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("grad", ["contiguous", "expanded"])  # as one long row, and in tiles
def test_every_number_through_the_passes(grad, with_output, dtype):
    if dtype == torch.float32:
        h = torch.linspace(-15, 15, 2**16, device=DEVICE)
    else:
        h = all_numbers(dtype)
        h = h[h.isfinite()]
    h = h[: len(h) // 64 * 64].view(-1, 64)
    dy = torch.ones((), device=DEVICE, dtype=dtype).expand(h.shape)
    dy = dy.contiguous() if grad == "contiguous" else dy
    dh, again, _ = gelu_backward(dy, h, False, False, with_output)
    true_y, true_grad, _ = truth(h)
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    for ours, true in ((gelu_forward(h, False), true_y), (dh, true_grad), (again, true_y)):
        if not ours.numel():
            assert not with_output
            continue
        assert ours.dtype == dtype
        allowed = 0.75 * eps * true.abs() + 8 * least + 1e-7 * (h < 0)
        if dtype == torch.float32:
            allowed = 2 * eps * true.abs() + 3e-7
        assert ((ours.double() - true).abs() <= allowed).all()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_non_finite_numbers_show(dtype):
    """As h * Phi(h) has it, whose second factor is 0 at -inf."""
    inf, nan = float("inf"), float("nan")
    h = torch.tensor([[inf, -inf, nan, -0.0, 1e4, -1e4]]).to(DEVICE, dtype)
    y = torch.tensor([[inf, nan, nan, -0.0, 1e4, 0]]).to(DEVICE, dtype)
    grad = torch.tensor([[nan, nan, nan, 0.5, 1, 0]]).to(DEVICE, dtype)
    dh, again, _ = gelu_backward(torch.ones_like(h), h, False, False, True)
    for ours, true in ((gelu_forward(h, False), y), (again, y), (dh, grad)):
        torch.testing.assert_close(ours, true, equal_nan=True)
