"""Weight gradients on a second stream are those of one stream, whenever that stream gets to them.

Without a GPU the second stream is played: it works at once, or as late as it may, when the first
comes to wait for it. What it was given must then still be there, and be what it was.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.fused import block, second_stream
from fastgpt.fused.second_stream import Beside
from fastgpt.train_step import TrainStep
from tests.close import DEVICE
from tests.marks import slow

SIZES = dict(block_size=16, vocab_size=41, n_layer=3, n_head=2, n_embd=32)
played = pytest.mark.skipif(DEVICE == "cuda", reason="there the stream is a real one")


class Streams:
    """torch.cuda's of a device; work put onto the second waits if it is lazy."""

    def __init__(self, lazy):
        self.lazy, self.late, self.said = lazy, [], []
        self.first, self.second = Stream(self, "first"), Stream(self, "second")
        self.now = self.first

    @contextmanager
    def on(self, stream):
        self.now = stream
        yield
        self.now = self.first

    def product(self, dy, x, dtype):
        if not (self.lazy and self.now is self.second):
            self.said.append(f"product on {self.now.name}")
            return dy.t().to(dtype) @ x.to(dtype)
        made = torch.full((dy.shape[1], x.shape[1]), torch.nan, dtype=dtype)
        given = weakref.ref(dy), weakref.ref(x)

        def work():
            a, b = (ref() for ref in given)
            assert a is not None and b is not None, "freed before the stream has read it"
            made.copy_(a.t().to(dtype) @ b.to(dtype))

        self.late.append(work)
        return made


class Stream:
    device = torch.device("cpu")

    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def wait_stream(self, other):
        self.streams.said.append(f"{self.name} waits")
        if self is self.streams.first:
            while self.streams.late:
                self.streams.late.pop(0)()


@pytest.fixture
def streams(monkeypatch, request):
    made = Streams(request.param)
    monkeypatch.setattr(second_stream.torch.cuda, "current_stream", lambda: made.first)
    monkeypatch.setattr(second_stream.torch.cuda, "stream", made.on)
    monkeypatch.setattr(second_stream, "_second_stream", lambda device: made.second)
    monkeypatch.setattr(second_stream, "wgrad", made.product)
    monkeypatch.setattr(block, "in_order", made.product)
    return made


def gradients(overlaps, mode, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | dict(return_logits=False) | changes)).to(DEVICE)
    model.overlaps = overlaps
    idx = torch.randint(41, (3, 17), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch.manual_seed(2)
    with use_backend(mode):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@played
@pytest.mark.parametrize("streams", [slow(False), True], indirect=True, ids=["at once", "late"])
@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("changes", [{}, dict(bias=False, dropout=0.5)], ids=["plain", "dropout"])
def test_the_bits_are_those_of_one_stream(streams, mode, changes):
    if mode == "auto":
        changes = changes | dict(dropout=0.0)  # SDPA has no fused dropout on a CPU
    alone = gradients(False, mode, **changes)
    streams.said.clear()
    beside = gradients(True, mode, **changes)
    assert streams.said.count("first waits") == SIZES["n_layer"]  # once a block
    assert streams.said.count("second waits") == 4 * SIZES["n_layer"]  # once a gradient
    assert "product on first" not in streams.said
    for name, grad in alone.items():
        assert torch.equal(beside[name], grad), name


@played
@pytest.mark.parametrize("streams", [True], indirect=True)
def test_a_stream_that_nobody_waits_for_is_noticed(streams, monkeypatch):
    """The stand-in is no better than its work is late."""
    monkeypatch.setattr(Beside, "join", lambda self: None)
    assert any(grad.isnan().any() for grad in gradients(True, "auto").values())


@played
@pytest.mark.parametrize("streams", [True], indirect=True)
def test_operands_that_nobody_holds_are_noticed(streams):
    beside = Beside()
    beside(torch.ones(2, 3), torch.ones(2, 4), torch.float32)
    beside.read.clear()
    with pytest.raises(AssertionError, match="freed before"):
        beside.join()


def test_it_is_asked_for_with_a_graph():
    model = GPT(GPTConfig(**SIZES, return_logits=False)).to(DEVICE)
    how = model, 0.1, 1e-2, (0.9, 0.95)
    with pytest.raises(ValueError, match="overlap=True needs capture=True"):
        TrainStep(*how, overlap=True)
    assert not model.overlaps


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_with_it_is_the_captured_step():
    losses = []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES, return_logits=False)).to(DEVICE)
        how = model, 0.1, 1e-2, (0.9, 0.95), 1.0, torch.bfloat16
        step = TrainStep(*how, capture=True, overlap=overlap)
        idx = torch.randint(41, (8, 17), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        losses.append([step([(idx[:, :-1], idx[:, 1:])]).item() for _ in range(10)])
    assert losses[0] == losses[1]
