"""Cross entropy: kernels against float64, and the corners of what counts."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops, reference, use_backend
from fastgpt.implementations import aten
from fastgpt.kernels import cross_entropy
from tests.close import DEVICE, LAYOUTS, assert_as_accurate, evaluate, randn

pytestmark = pytest.mark.ops("cross_entropy", "linear_cross_entropy")

ROWS_VOCAB = [(37, 65), (1, 1), (3, 2), (5, 97), (70, 100), (4, 1600), (2, 5000), (1, 50304)]


def in_place(logits, targets):
    """The kernel of linear_cross_entropy, which makes the logits their own gradient."""
    eye = torch.eye(logits.shape[1], device=DEVICE, dtype=logits.dtype)
    return ops.linear_cross_entropy(logits, eye, targets)


CROSS_ENTROPIES = {"kernels": ops.cross_entropy, "kernel in place": in_place}
if DEVICE == "cpu":
    CROSS_ENTROPIES["aten"] = aten.cross_entropy


IN_PLACE_VOCAB = [
    1,
    2,
    64,
    65,
    97,
    1600,
    8191,
    8192,
    8193,
    17000,
    50257,
]  # in whole blocks, and not


def targets_of(N, V):
    return torch.randint(V, (N,), device=DEVICE)


def scalar(value=1.0):
    return torch.tensor(value, device=DEVICE)


def assert_in_place(logits, targets, factor=1 / 3):
    """The kernel of linear_cross_entropy alone, rows of targets -1 ignored, against float64."""
    dtype = logits.dtype
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, ignore_index=-1, reduction="none")
    (truth,) = torch.autograd.grad(losses.sum() * factor, leaf)
    dlogits = logits.clone()
    ours = cross_entropy.cross_entropy_(dlogits, targets, -1, scalar(factor))
    torch.testing.assert_close(ours.double(), losses.detach(), rtol=1e-6, atol=1e-6)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    rtol = 4e-6 if dtype == torch.float32 else 0.51 * eps
    hit = F.one_hot(targets.clamp(min=0), logits.shape[1]).bool() & (targets != -1)[:, None]
    of_one = factor * torch.finfo(torch.float32).eps  # p - 1, where p is 1 in fp32
    for where, atol in ((hit, of_one), (~hit, 1e-9)):
        torch.testing.assert_close(
            dlogits[where].double(), truth[where], rtol=rtol, atol=max(atol, tiny * eps)
        )


@pytest.mark.parametrize("V", IN_PLACE_VOCAB)
def test_in_place(V, dtype):
    logits, targets = randn(4, V, dtype=dtype, scale=3.0), targets_of(4, V)
    targets[0], targets[1] = V - 1, -1
    logits[1, V // 2] = float("nan")  # of an ignored row
    logits[2, V - 1] += 20  # and in the last block
    assert_in_place(logits.nan_to_num(0.5), targets)
    dlogits = logits.clone()
    losses = cross_entropy.cross_entropy_(dlogits, targets, -1, scalar())
    assert losses[1] == 0 and not dlogits[1].any()


@pytest.mark.parametrize("V", [33, 9000])
def test_rows_in_place_that_need_care(V):
    logits = randn(7, V)
    logits[0] = 2.0  # ties
    logits[1] += 1e6
    logits[2] -= 1e6
    logits[3] = torch.finfo(torch.float32).min  # all masked, alike
    logits[4, : V - 1] = -float("inf")
    logits[5, 1:] = -float("inf")
    logits[6] = 3e38
    targets = torch.tensor([0, 1, 2, 3, V - 1, 0, 5], device=DEVICE)
    assert_in_place(logits, targets)


@pytest.mark.parametrize("size", [0, 1, 4097, 200_003])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, float("nan")])
def test_rescale(size, scale, dtype):
    t = randn(size, dtype=dtype)
    expected = (t.float() * scalar(scale)).to(dtype)
    cross_entropy.registered_rescale_(t, scalar(scale))
    torch.testing.assert_close(t, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("N, V", ROWS_VOCAB)
def test_cross_entropy(N, V, dtype):
    logits, targets = randn(N, V, dtype=dtype, scale=3.0), targets_of(N, V)
    assert_as_accurate(
        ops.cross_entropy, reference.cross_entropy, logits, targets, grads=[scalar(1.7)]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    logits = LAYOUTS[layout](randn(9, 97))
    targets = torch.stack([targets_of(9, 97), targets_of(9, 97)], dim=1)[:, 0]  # stride 2
    assert_as_accurate(
        ops.cross_entropy, reference.cross_entropy, logits, targets, grads=[scalar()]
    )


@pytest.mark.parametrize("ignore_index", [-1, -100, 5])
def test_ignored_rows(ignore_index, dtype):
    logits, targets = randn(20, 33, dtype=dtype), targets_of(20, 33)
    targets[::3] = ignore_index
    ours, ref = (
        functools.partial(f, ignore_index=ignore_index)
        for f in (ops.cross_entropy, reference.cross_entropy)
    )
    assert_as_accurate(ours, ref, logits, targets, grads=[scalar()])


def test_all_ignored_is_nan_with_zero_gradient():
    """As F.cross_entropy: 0/0 is NaN, and no row passes anything back."""
    logits, targets = randn(5, 33), torch.full((5,), -1, device=DEVICE)
    with use_backend("triton"):
        (loss,), (grad,) = evaluate(ops.cross_entropy, [logits, targets], [scalar()], None)
    assert loss.isnan() and not grad.any()


def test_rows_of_mean_30(dtype):
    logits = (30 + randn(8, 97, dtype=torch.float64)).to(dtype)
    args = logits, targets_of(8, 97)
    assert_as_accurate(
        ops.cross_entropy, reference.cross_entropy, *args, grads=[scalar()], eager=False, budget=4
    )


def test_large_logits(dtype):
    """Hundreds apart, within a block of logits and from one to the next: exp would overflow."""
    logits, targets = randn(3, 9000, dtype=dtype), targets_of(3, 9000)
    logits[:, [7, 4000]] += 200
    logits[1:, 7] += 300
    args = logits, targets
    assert_as_accurate(ops.cross_entropy, reference.cross_entropy, *args, grads=[scalar()])


@pytest.mark.parametrize("op", CROSS_ENTROPIES)
def test_differences_of_huge_logits(op):
    """At 1e6 neighbours are 1/16 apart: rounded there, a logsumexp is wrong by a few percent."""
    logits, targets = 1e6 + randn(6, 5000, scale=0.5), targets_of(6, 5000)
    logits[2] = 3e7  # all alike
    logits[3] -= 2e6
    args = logits, targets
    assert_as_accurate(CROSS_ENTROPIES[op], reference.cross_entropy, *args, grads=[scalar()])


@pytest.mark.parametrize("op", CROSS_ENTROPIES)
@pytest.mark.parametrize("upstream", [1.0, 65536.0, 65536 / 3])
def test_small_probabilities_outlive_half_precision(op, upstream):
    """A mean's gradients are below fp16's range before the loss scale arrives, and within after."""
    logits, targets = randn(600, 500, dtype=torch.float16, scale=2.0), targets_of(600, 500)
    args, grads = (logits, targets), [scalar(upstream)]
    assert_as_accurate(CROSS_ENTROPIES[op], reference.cross_entropy, *args, grads=grads)


def test_masked_vocabulary():
    """-inf in every logit of a block, first or last, is a probability of 0 and not NaN."""
    for dead in (slice(0, 4500), slice(4500, 9000)):
        logits, targets = randn(2, 9000), torch.tensor([0, 0], device=DEVICE)
        logits[:, dead] = -float("inf")
        targets += 8999 if dead.start == 0 else 0
        assert_as_accurate(
            ops.cross_entropy, reference.cross_entropy, logits, targets, grads=[scalar()]
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_show(value):
    logits, targets = randn(3, 33), targets_of(3, 33)
    logits[1, 7] = value
    with use_backend("triton"):
        (loss,), (grad,) = evaluate(ops.cross_entropy, [logits, targets], [scalar()], None)
    assert loss.isnan()
    assert grad[1].isnan().any() and grad[0].isfinite().all()


def test_gradient_scaler_sized_gradients():
    """fp16's GradScaler starts at 2**16: the scale must meet the gradient in fp32."""
    logits, targets = randn(8, 33, dtype=torch.float16), targets_of(8, 33)
    assert_as_accurate(
        ops.cross_entropy, reference.cross_entropy, logits, targets, grads=[scalar(65536.0)]
    )


@pytest.mark.parametrize("bad", [33, -2, 2**40])
def test_target_outside_the_vocabulary(bad):
    logits, targets = randn(3, 33), targets_of(3, 33)
    targets[1] = bad
    with use_backend("triton"):
        if DEVICE == "cpu":
            with pytest.raises(IndexError, match=rf"{bad}.*\[0, 33\)"):
                ops.cross_entropy(logits, targets)
        else:
            assert ops.cross_entropy(logits, targets).isnan()


def test_linear_cross_entropy(dtype):
    x, w, targets = randn(37, 24, dtype=dtype), randn(97, 24, dtype=dtype), targets_of(37, 97)
    targets[3] = -1
    assert_as_accurate(
        ops.linear_cross_entropy, reference.linear_cross_entropy, x, w, targets, grads=[scalar()]
    )


@pytest.mark.parametrize("op", CROSS_ENTROPIES)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_the_gradient_is_the_callers_to_write_to(op, upstream):
    logits, targets = randn(9, 33).requires_grad_(), targets_of(9, 33)
    with use_backend("triton"):
        loss = upstream * CROSS_ENTROPIES[op](logits, targets)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], kept)
