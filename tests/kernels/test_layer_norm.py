"""LayerNorm and residual add + LayerNorm: kernels against float64."""

import pytest
import torch

from fastgpt import ops, reference, use_backend
from fastgpt.kernels import layer_norm
from tests.close import DEVICE, LAYOUTS, assert_as_accurate, randn

pytestmark = pytest.mark.ops("layer_norm", "add_layer_norm")

ROWS_COLS = [(4, 17), (0, 16), (600, 40), (3, 97), (5, 100), (9, 768), (7, 1023), (2, 1600)]


def weights(N, bias, dtype):
    return randn(N, dtype=dtype), randn(N, dtype=dtype) if bias else None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("M, N", ROWS_COLS)
def test_layer_norm(M, N, bias, dtype):
    x = randn(M, N, dtype=dtype)
    grads = [randn(M, N, dtype=dtype)]
    assert_as_accurate(
        ops.layer_norm, reference.layer_norm, x, *weights(N, bias, dtype), grads=grads
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("M, N", ROWS_COLS)
def test_add_layer_norm(M, N, bias, dtype):
    delta, residual = randn(M, N, dtype=dtype), randn(M, N, dtype=dtype)
    grads = [randn(M, N, dtype=dtype), randn(M, N, dtype=dtype)]
    w, b = weights(N, bias, dtype)
    assert_as_accurate(
        ops.add_layer_norm, reference.add_layer_norm, delta, residual, w, b, grads=grads
    )


def test_the_sum_is_normalised_as_it_is_returned():
    """Rounded: the backward has nothing else to go by."""
    delta, residual = (randn(5, 97, dtype=torch.float16) for _ in range(2))
    w, b = weights(97, True, torch.float16)
    with use_backend("triton"):
        y, s = ops.add_layer_norm(delta, residual, w, b)
        assert torch.equal(y, ops.layer_norm(s, w, b))


def test_rows_of_one_element(dtype):
    """Normalised it is 0, and so is its gradient but for a rounding of dy * w, which a fused
    multiply-add leaves out on one side of a difference, times rstd.
    """
    x, dy = randn(5, 1, dtype=dtype).requires_grad_(), randn(5, 1, dtype=dtype)
    (w, b), eps = weights(1, True, dtype), 1e-5
    with use_backend("triton"):
        y = ops.layer_norm(x, w, b, eps)
    assert torch.equal(y, b.expand_as(y))
    y.backward(dy)
    bound = torch.finfo(torch.float32).eps * (dy * w).abs().max().float() * eps**-0.5
    assert x.grad.abs().max() <= bound


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, grad_layout):
    x, residual = (LAYOUTS[layout](randn(6, 97)) for _ in range(2))
    grads = [LAYOUTS[grad_layout](randn(6, 97)) for _ in range(2)]
    w, b = (LAYOUTS["strided"](randn(97)) for _ in range(2))
    assert_as_accurate(ops.layer_norm, reference.layer_norm, x, w, b, grads=grads)
    assert_as_accurate(ops.add_layer_norm, reference.add_layer_norm, x, residual, w, b, grads=grads)


def test_every_tensor_in_its_own_layout():
    delta, residual, *grads = (
        LAYOUTS[layout](randn(6, 97))
        for layout in ("contiguous", "strided", "sliced", "transposed")
    )
    args = delta, residual, randn(97), randn(97)
    assert_as_accurate(ops.add_layer_norm, reference.add_layer_norm, *args, grads=grads)


@pytest.mark.parametrize("N", [17, 100, 768])
def test_rows_of_mean_30(N, dtype):
    """A fixed budget: eager's own fp16 statistics are several times off here."""
    x = (30 + randn(8, N, dtype=torch.float64)).to(dtype)
    w, b = weights(N, True, dtype)
    grads = [randn(8, N, dtype=dtype)]
    # xhat = (x - mean) * rstd carries the fp32 rounding of a mean 30 standard deviations away
    assert_as_accurate(
        ops.layer_norm, reference.layer_norm, x, w, b, grads=grads, eager=False, budget=4
    )


def test_low_precision_branch_on_fp32_residual(dtype):
    """As under autocast: the sum and its gradient stay fp32, the branch gets its own dtype back."""
    delta, residual = randn(5, 97, dtype=dtype), randn(5, 97)
    w, b = weights(97, True, torch.float32)
    grads = [randn(5, 97), randn(5, 97)]
    assert_as_accurate(
        ops.add_layer_norm, reference.add_layer_norm, delta, residual, w, b, grads=grads
    )


def test_column_strides_beyond_32_bits(tmp_path):
    """stride * column overflows an int32. A sparse file lends the address space, not the memory."""
    stride, N = 2**27 + 1, 17
    if DEVICE == "cpu":
        memory = torch.from_file(str(tmp_path / "sparse"), True, stride * N, dtype=torch.float16)
    else:
        memory = torch.empty(stride * N, device=DEVICE, dtype=torch.float16)
    x = memory.as_strided((2, N), (1, stride)).copy_(randn(2, N, dtype=torch.float16))
    weight = torch.ones(N, device=DEVICE, dtype=torch.float16)
    with use_backend("triton"):
        ours = ops.layer_norm(x, weight)
    torch.testing.assert_close(ours, reference.layer_norm(x, weight))


def test_leading_dimensions():
    x = randn(2, 3, 5, 24)
    args = x, randn(24), randn(24)
    assert_as_accurate(ops.layer_norm, reference.layer_norm, *args, grads=[randn(2, 3, 5, 24)])


def test_autocast_gives_eagers_dtype():
    """fp32 on CUDA, where autocast promotes LayerNorm; the input's on a CPU, where it does not."""
    x, w = randn(4, 64, dtype=torch.float16), randn(64, dtype=torch.float16)
    with use_backend("triton"), torch.autocast(DEVICE, dtype=torch.float16):
        assert ops.layer_norm(x, w).dtype == reference.layer_norm(x, w).dtype
        ours, eager = ops.add_layer_norm(x, x, w), reference.add_layer_norm(x, x, w)
        assert [t.dtype for t in ours] == [t.dtype for t in eager]


def test_many_rows_in_few_strips(dtype):
    """More rows than the backward has programs: every strip adds many partial sums."""
    x, w, b = randn(4000, 16, dtype=dtype), *weights(16, True, dtype)
    grads = [randn(4000, 16, dtype=dtype)]
    assert_as_accurate(ops.layer_norm, reference.layer_norm, x, w, b, grads=grads)


def test_sums_of_more_partials_than_a_block_holds(monkeypatch):
    """As many programs as on a large GPU, each with a row or two."""
    monkeypatch.setattr(layer_norm, "multiprocessors", lambda t: 500)
    x, w, b = randn(1300, 1000), *weights(1000, True, torch.float32)
    grads = [randn(1300, 1000)]
    assert_as_accurate(ops.layer_norm, reference.layer_norm, x, w, b, grads=grads)
