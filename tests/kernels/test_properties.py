"""Any call of any op: hypothesis draws the shapes, strides, dtype and which inputs need a gradient.

A few examples per op, the same ones at every run, so that what turns red was changed.
FASTGPT_DEEP=1 (`make test-deep`) draws 20 times as many, new and larger; a failure prints the line
that repeats it.
"""

import os
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor

from fastgpt import use_backend
from tests.calls import ATTENTION, OPS, SIZES, Call, Op, batch_of, some_call
from tests.close import DEVICE, assert_as_accurate, randn
from tests.conftest import DTYPES

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis, of the dev extra, is missing")
st = hypothesis.strategies

DEEP = os.environ.get("FASTGPT_DEEP") == "1"


@st.composite
def calls(draw: Callable, op: Op, dtypes: list[torch.dtype] = DTYPES) -> Call:
    larger = {"T": range(1, 71), "D": range(16, 71)} if DEEP else {}
    return some_call(op, lambda some: draw(st.sampled_from(some)), dtypes, SIZES | larger)


def for_any(few: int) -> Callable:
    """Run a test with drawn `data`, `few` times in CI."""
    limits = hypothesis.settings(
        max_examples=20 * few if DEEP else few,
        derandomize=not DEEP,
        database=None,
        print_blob=True,
        deadline=None,  # the first launch of a kernel compiles it
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    return lambda test: limits(hypothesis.given(data=st.data())(test))


class Graph:
    """A call on the kernels in which the inputs numbered `need` need a gradient."""

    def __init__(self, call: Call, need: Collection[int]):
        self.leaves = [t if t is None else t.detach() for t in call.inputs]
        self.needed = [self.leaves[i].requires_grad_() for i in sorted(need)]
        with use_backend("triton"):
            out = call.ours(*self.leaves)
        self.outputs = list(out) if isinstance(out, tuple) else [out]
        self.incoming = call.grads

    def gradients(self, **options: bool) -> list[Tensor]:
        return torch.autograd.grad(self.outputs, self.needed, self.incoming, **options)


def floating(call: Call) -> list[int]:
    return [i for i, t in enumerate(call.inputs) if t is not None and t.is_floating_point()]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", OPS)
@for_any(6)
def test_as_accurate_as_eager(name, data):
    call = data.draw(calls(OPS[name]))
    # a search finds the cases, of an element or two, in which eager is exact by luck: hence the 4
    assert_as_accurate(call.ours, call.ref, *call.inputs, grads=call.grads, budget=4)


@pytest.mark.parametrize("name", OPS)
@for_any(2)
def test_inputs_without_a_gradient_change_nothing(name, data):
    """As when weights are frozen: outputs and the other gradients keep their bits."""
    call = data.draw(calls(OPS[name]))
    everything = set(floating(call))
    full = Graph(call, everything)
    expected = dict(zip(sorted(everything), full.gradients(), strict=True))
    some = data.draw(st.sets(st.sampled_from(sorted(everything)), min_size=1))
    for need in (some, *(everything - {i} for i in everything)):
        part = Graph(call, need)
        assert_same_bits(part.outputs, full.outputs)
        if need:
            assert_same_bits(part.gradients(), [expected[i] for i in sorted(need)])
        else:
            assert not any(t.requires_grad for t in part.outputs)


@pytest.mark.parametrize("name", OPS)
@for_any(2)
def test_a_graph_gives_the_same_bits_again_and_no_second_derivative(name, data):
    call = data.draw(calls(OPS[name]))
    graph = Graph(call, floating(call))
    assert_same_bits(graph.gradients(retain_graph=True), graph.gradients(retain_graph=True))
    if any(t is not None and t.numel() == 0 for t in call.inputs):
        return  # PyTorch's own op, which has a second derivative
    with pytest.raises(RuntimeError, match="only once"):
        graph.gradients(create_graph=True)


@pytest.mark.parametrize("name", OPS)
@for_any(2)
def test_samples_in_another_order(name, data):
    """Outputs and gradients follow; what belongs to all of the batch, as a weight's, stays."""
    call = data.draw(calls(OPS[name], [torch.float32]))
    of_batch = [spec[0] == batch_of(OPS[name]) for spec in OPS[name].inputs.split(", ")]
    order = torch.randperm(call.inputs[0].shape[0], device=DEVICE)
    inputs = [t[order] if yes else t for t, yes in zip(call.inputs, of_batch, strict=True)]
    grads = [g[order] if g.dim() else g for g in call.grads]

    need = floating(call)
    given = Graph(call, need)
    shuffled = Graph(call._replace(inputs=inputs, grads=grads), need)
    expected = [t[order] if t.dim() else t for t in given.outputs]
    expected += [
        g[order] if of_batch[i] else g for i, g in zip(need, given.gradients(), strict=True)
    ]
    ours = shuffled.outputs + list(shuffled.gradients())
    for a, b in zip(ours, expected, strict=True):
        # sums over the batch are added up in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ATTENTION)
@for_any(5)
def test_no_token_depends_on_a_later_one(name, data):
    """The past's outputs do not change with the future; the future gets no gradient from them."""
    call = data.draw(calls(ATTENTION[name]))
    past = data.draw(st.integers(1, call.grads[0].shape[-2]))
    inputs, grads = ([t.clone() for t in tensors] for tensors in (call.inputs, call.grads))
    for t in inputs:
        t[..., past:, :] = 7
    grads[0][..., past:, :] = 0

    given = Graph(call._replace(grads=grads), floating(call))
    changed = Graph(call._replace(inputs=inputs), [])
    assert torch.equal(given.outputs[0][..., :past, :], changed.outputs[0][..., :past, :])
    assert all(g[..., past:, :].count_nonzero() == 0 for g in given.gradients())


ROUNDINGS = 16  # of the largest shifted element: its own, and those of the sums it enters


@for_any(10)
def test_cross_entropy_of_shifted_rows(data):
    """softmax(x + c) = softmax(x)"""
    call = data.draw(calls(OPS["cross_entropy"], [torch.float32]))
    x, targets = call.inputs
    shifted = x + 100 * randn(x.shape[0], 1)
    a, b = (Graph(call._replace(inputs=[t, targets]), [0]) for t in (x, shifted))
    atol = ROUNDINGS * torch.finfo(x.dtype).eps * shifted.abs().max().item()
    torch.testing.assert_close(a.outputs, b.outputs, rtol=0, atol=atol)
    (da,), (db,), scale = a.gradients(), b.gradients(), call.grads[0].abs().item()
    torch.testing.assert_close(da, db, rtol=0, atol=atol * scale)


@for_any(10)
def test_layer_norm_of_shifted_rows(data):
    """x + c - mean(x + c) = x - mean(x)"""
    call = data.draw(calls(OPS["layer_norm"], [torch.float32]))
    x, weight, bias = call.inputs
    shifted = x + 100 * randn(*x.shape[:-1], 1)
    a, b = (Graph(call._replace(inputs=[t, weight, bias]), []) for t in (x, shifted))
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    eps = ROUNDINGS * torch.finfo(x.dtype).eps
    largest = shifted.abs().amax(-1, keepdim=True)
    allowed = eps * largest * (variance + 1e-5).rsqrt() * weight.abs()
    allowed += eps * a.outputs[0].abs()  # where weight is about 0, adding the bias rounds too
    assert ((a.outputs[0] - b.outputs[0]).abs() <= allowed).all()
