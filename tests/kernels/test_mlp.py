"""Linear + bias + GELU and the MLP on it: kernels against float64, with either GEMM."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops, reference, use_backend
from fastgpt.kernels import _launch, _tuned, gemm_gelu, gemm_tma, mlp
from fastgpt.kernels.gelu import gelu_forward
from tests.close import DEVICE, LAYOUTS, assert_as_accurate, randn

pytestmark = pytest.mark.ops("linear_gelu", "mlp")

GEMMS = {"cublas": mlp.cublas, "triton": mlp.own}
M_K_N = [
    (5, 17, 97),
    (1, 1, 1),
    (0, 16, 16),
    (37, 100, 64),
    (130, 64, 17),
    (3, 768, 100),
    (2, 48, 1600),
    (140, 72, 264),  # for TMA in fp16: more tiles than programs, none of them full, K in two steps
    (600, 16, 40),  # more rows than a strip of the backward or a group of the GEMM has blocks
]


needs_descriptors = pytest.mark.skipif(
    not _launch.DESCRIPTORS, reason="this Triton has no tensor descriptors"
)


@pytest.fixture(params=GEMMS)
def gemm(request):
    with use_backend("auto", linear_gelu=request.param, mlp=request.param):
        yield GEMMS[request.param]


def linear(K, N, bias, dtype):
    """A layer whose outputs are about N(0, 1), so that GELU is neither linear nor flat."""
    return randn(N, K, dtype=dtype, scale=K**-0.5), randn(N, dtype=dtype) if bias else None


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("M, K, N", M_K_N)
def test_linear_gelu(M, K, N, bias, approximate, gemm, dtype):
    x, (w, b) = randn(M, K, dtype=dtype), linear(K, N, bias, dtype)
    assert_as_accurate(
        functools.partial(gemm.linear_gelu, approximate=approximate),
        functools.partial(reference.linear_gelu, approximate=approximate),
        x, w, b, grads=[randn(M, N, dtype=dtype)],
    )  # fmt: skip


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("M, C", [(1, 1), (0, 8), (37, 24), (5, 97), (3, 192), (260, 72)])
def test_mlp(M, C, bias, approximate, gemm, dtype):
    (w1, b1), (w2, b2) = linear(C, 4 * C, bias, dtype), linear(4 * C, C, bias, dtype)
    assert_as_accurate(
        functools.partial(gemm.mlp, approximate=approximate),
        functools.partial(reference.mlp, approximate=approximate),
        randn(M, C, dtype=dtype), w1, b1, w2, b2, grads=[randn(M, C, dtype=dtype)],
    )  # fmt: skip


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, grad_layout, gemm):
    x, w = LAYOUTS[layout](randn(18, 33)), LAYOUTS[layout](randn(65, 33, scale=0.2))
    b = LAYOUTS["strided"](randn(65))
    grads = [LAYOUTS[grad_layout](randn(18, 65))]
    assert_as_accurate(gemm.linear_gelu, reference.linear_gelu, x, w, b, grads=grads)
    proj = LAYOUTS[layout](randn(33, 65, scale=0.2)), LAYOUTS["strided"](randn(33))
    grads = [LAYOUTS[grad_layout](randn(18, 33))]
    assert_as_accurate(gemm.mlp, reference.mlp, x, w, b, *proj, grads=grads)


@pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu compiles it, in a process of its own")
def test_a_gemm_in_one_part_as_warp_specialisation_wants_it():
    args = randn(40, 24, dtype=torch.float16), *linear(24, 96, True, torch.float16)
    with _tuned.trying("gemm_tma_fc", gemm_tma.SPECIALIZED):
        grads = [randn(40, 96, dtype=torch.float16)]
        assert_as_accurate(mlp.own.linear_gelu, reference.linear_gelu, *args, grads=grads)


@needs_descriptors
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's shared memory has no room for fp32 tiles")
@pytest.mark.parametrize("tanh", [False, True])
def test_tma_kernels_in_fp32(tanh):
    """In 16 bits the gradients of the two GELUs look alike."""
    x, (w, b), dy = randn(140, 72), linear(72, 136, True, torch.float32), randn(140, 72)
    h, y = gemm_tma.fc(x, w, b, tanh)
    dh, again, db = gemm_tma.dgrad(dy, w.t().contiguous(), h, tanh, True, True)
    exact = F.linear(x.double(), w.double(), b.double()).requires_grad_()
    gelu = F.gelu(exact, approximate="tanh" if tanh else "none")
    (grad,) = torch.autograd.grad(gelu, exact, dy.double() @ w.double().t())
    for ours, truth in ((h, exact), (y, gelu), (again, gelu), (dh, grad), (db, grad.sum(0))):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)


def test_tma_takes_what_it_can_describe():
    x = randn(16, 64, dtype=torch.float16)
    wide = randn(16, 72, dtype=torch.float16)
    if not _launch.has_tma(x):
        pytest.skip("this GPU has no TMA, or this Triton no descriptors")
    for t in (x, x[::2], wide[:, :60], wide[:, 8:]):
        assert gemm_tma.takes(t), t.stride()
    for t in (x.float(), x.t(), x[:0], randn(16, 60).half(), wide[:, 1:], x[:1].expand(4, 64)):
        assert not gemm_tma.takes(x, t), t.stride()


def test_a_triton_without_descriptors_takes_the_other_kernels(monkeypatch):
    """Of tensors that TMA would take: also on Hopper, as `fastgpt inspect` sees it."""
    monkeypatch.setattr(_launch, "DESCRIPTORS", False)
    x, (w, b) = randn(140, 72, dtype=torch.float16), linear(72, 264, True, torch.float16)
    proj, none = randn(72, 264, dtype=torch.float16, scale=264**-0.5), None
    with _launch.record(arch=90) as launches:
        h, _ = gemm_gelu.forward(x, w, b, False)
        gemm_gelu.dgrad(x, proj, h, False, True, True)
    assert [launch.kernel.__name__ for launch in launches] == [
        "_gemm_gelu_kernel",
        "_gelu_backward_kernel",
    ]
    grads = [randn(140, 72, dtype=torch.float16)]
    assert_as_accurate(mlp.own.mlp, reference.mlp, x, w, b, proj, none, grads=grads)


@pytest.mark.parametrize("layout", ["contiguous", "offset"])  # for TMA, and not
def test_gemms_accumulate_in_fp32(layout):
    """One large term, then hundreds too small to move a sum in fp16 one by one."""
    ones, few = (torch.ones(n, 512, device=DEVICE, dtype=torch.float16) for n in (8, 16))
    few[:, 1:] = 7e-6
    x, grads = LAYOUTS[layout](ones), [randn(8, 16, dtype=torch.float16)]
    assert_as_accurate(
        mlp.own.linear_gelu, reference.linear_gelu, x, few, None,
        grads=grads, eager=False, budget=1.5,
    )  # fmt: skip
    flat = torch.full((8, 16), 9.0, device=DEVICE, dtype=torch.float16)  # where GELU's slope is 1
    dh, _, _ = gemm_gelu.dgrad(x, few.t().contiguous(), flat, False, True, True)
    truth = few.double().sum(1).expand(8, 16)
    torch.testing.assert_close(dh.double(), truth, rtol=0.0, atol=6e-4)


def test_only_the_asked_gradients():
    """Frozen weights, as under LoRA: their gradients are not computed, the rest is unchanged."""
    x, (w1, b1), (w2, b2) = (
        randn(5, 24),
        linear(24, 96, True, torch.float32),
        linear(96, 24, True, torch.float32),
    )
    args = [x, w1, b1, w2, b2]
    with use_backend("triton"):
        full = [t.clone().requires_grad_() for t in args]
        ops.mlp(*full).sum().backward()
        for i in range(5):
            one = [t.clone().requires_grad_(i == j) for j, t in enumerate(args)]
            ops.mlp(*one).sum().backward()
            # compiled, a kernel that writes less may round otherwise
            torch.testing.assert_close(one[i].grad, full[i].grad, rtol=1e-5, atol=1e-5)
            assert all(t.grad is None for j, t in enumerate(one) if j != i)


def test_erf_and_tanh_differ():
    """The two GELUs are 1e-4 apart: a kernel that mixed them up would not pass as exact."""
    h = torch.linspace(-4, 4, 1001, device=DEVICE).view(-1, 1)
    for tanh, approximate in ((False, "none"), (True, "tanh")):
        error = gelu_forward(h, tanh).double() - F.gelu(h.double(), approximate=approximate)
        assert error.abs().max() < 2e-6


def test_autocast_runs_in_low_precision(gemm):
    with use_backend("triton", linear_gelu="cublas"), torch.autocast(DEVICE, dtype=torch.float16):
        y = ops.linear_gelu(randn(4, 16), *linear(16, 8, True, torch.float32))
    assert y.dtype == torch.float16
