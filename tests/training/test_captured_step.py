"""When TrainStep records its graph anew, and where: seen on a CPU, with graphs that do nothing."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import TrainStep
from fastgpt.train_step import _Graph
from tests.model.test_train_step import BETAS, batches, model


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.fixture
def recordings(monkeypatch):
    """The devices and streams that graphs were recorded on."""
    made, devices = [], []

    @contextlib.contextmanager
    def on(device):
        devices.append(device)
        yield
        devices.pop()

    @contextlib.contextmanager
    def graph(graph, stream):
        made.append((devices[-1], stream))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda self: None}))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made


@pytest.fixture
def step(recordings):
    step = TrainStep(model().cpu(), 0.1, 1e-2, BETAS)
    step.graph = _Graph(step)
    return step


def take(step: TrainStep) -> None:
    step([tuple(t.cpu() for t in batch) for batch in batches(0, 1, 8)])


def test_once_on_the_models_device(step, recordings):
    for _ in range(4):
        take(step)
    ((device, stream),) = recordings
    assert device == step.device and isinstance(stream, Stream)


def hook(model, monkeypatch):
    model.transformer.h[0].mlp.register_forward_hook(lambda m, x, y: 2 * y)


def module(model, monkeypatch):
    model.transformer.h[0].mlp.gelu = nn.SiLU()


def forward(model, monkeypatch):
    attn = model.transformer.h[1].attn
    monkeypatch.setattr(attn, "forward", lambda x: x, raising=False)


def forward_of_the_class(model, monkeypatch):
    kind = type(model.transformer.h[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: x)


def function(model, monkeypatch):
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda *args, **kwargs: gelu(*args, **kwargs))


def heads(model, monkeypatch):
    model.transformer.h[0].attn.n_head = 1


def dropout(model, monkeypatch):
    model.transformer.drop.p = 0.1


def weight(model, monkeypatch):
    model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight.detach().clone())


def frozen(model, monkeypatch):
    model.transformer.wpe.weight.requires_grad_(False)


def evaluated(model, monkeypatch):
    model.transformer.h[0].eval()


CHANGES = [
    hook, module, forward, forward_of_the_class, function, heads, dropout, weight, frozen, evaluated
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_anew_after_a_change_of_the_model(change, step, recordings, monkeypatch):
    """And once only."""
    take(step)
    change(step.model, monkeypatch)
    for _ in range(3):
        take(step)
    assert len(recordings) == 2


@pytest.mark.parametrize("part", ["micro_step", "graph"])
def test_after_a_recording_that_failed_there_is_none(part, step, recordings, monkeypatch):
    """Neither half a graph, nor the one before on memory that is not its own any more."""
    take(step)
    gelu = step.model.transformer.h[0].mlp.gelu
    step.model.transformer.h[0].mlp.gelu = nn.SiLU()
    with monkeypatch.context() as patch:
        owner = step if part == "micro_step" else torch.cuda
        patch.setattr(owner, part, lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(step)
    step.model.transformer.h[0].mlp.gelu = gelu
    assert step.graph.graph is None and all(p.grad is None for p in step.model.parameters())
    take(step)
    assert len(recordings) == 2


def test_a_model_that_changes_in_every_step_is_told_of(step, recordings):
    for i in range(4):
        step.model.number = i
        take(step)
    step.model.number = 5
    with pytest.warns(UserWarning, match="recorded 5 times in a row.*keep such values elsewhere"):
        take(step)


def test_blocks_that_are_computed_again_are_refused(monkeypatch):
    gpt = model()
    gpt.config.checkpoint_blocks = True
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda:0"), raising=False)
    with pytest.raises(ValueError, match="capture=True cannot record checkpoint_blocks=True"):
        TrainStep(gpt, 0.1, 1e-2, BETAS, capture=True)
