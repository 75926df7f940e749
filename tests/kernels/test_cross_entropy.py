"""Cross entropy: kernels against float64, and the corners of what counts."""

import functools

import pytest
import torch

from fastgpt import ops, reference, use_backend
from fastgpt.implementations import aten
from tests.close import DEVICE, LAYOUTS, assert_as_accurate, evaluate, randn

ROWS_VOCAB = [(37, 65), (1, 1), (3, 2), (5, 97), (70, 100), (4, 1600), (2, 5000), (1, 50304)]


def in_place(logits, targets):
    """The kernel of linear_cross_entropy, which makes the logits their own gradient."""
    eye = torch.eye(logits.shape[1], device=DEVICE, dtype=logits.dtype)
    return ops.linear_cross_entropy(logits, eye, targets)


CROSS_ENTROPIES = {"kernels": ops.cross_entropy, "kernel in place": in_place}
if DEVICE == "cpu":
    CROSS_ENTROPIES["aten"] = aten.cross_entropy


def targets_of(N, V):
    return torch.randint(V, (N,), device=DEVICE)


def scalar(value=1.0):
    return torch.tensor(value, device=DEVICE)


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
