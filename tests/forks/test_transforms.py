"""What PyTorch's program transforms make of the model: nanoGPT's numbers.

trace, export        a program recorded from one call, run on other ids
vmap, grad           torch.func over ids, targets or weights; batched incoming gradients
"""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt import use_backend
from tests.forks.test_changes import THEIRS, batch, built


def both() -> tuple[Any, Any]:
    ours, theirs = (built(library, (), ExitStack()) for library in (fastgpt, THEIRS))
    return ours, theirs


def agree(function: Any) -> None:
    """`function` of either model gives the same tensors."""
    ours, theirs = (function(model) for model in both())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


IDX, TARGETS = batch()
OTHER = torch.flip(IDX, (0, 1))


class Logits(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.model(idx)[0]


def trained(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("targets", [False, True], ids=["ids", "targets"])
def test_traced(targets):
    def run(model):
        if not targets:
            return torch.jit.trace(Logits(model), IDX)(OTHER)
        logits, loss = torch.jit.trace(model, (IDX, TARGETS))(OTHER, TARGETS)
        return [logits, *trained(model, loss)]

    agree(run)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    def run(model):
        return torch.export.export(model, (IDX, TARGETS), strict=strict).module()(OTHER, TARGETS)

    agree(run)


def test_exported_for_any_length():
    def run(model):
        T = torch.export.Dim("T", min=2, max=8)
        shapes = {"idx": {1: T}, "targets": {1: T}}
        program = torch.export.export(model, (IDX, TARGETS), dynamic_shapes=shapes)
        return program.module()(OTHER[:, :5], TARGETS[:, :5].clone())

    agree(run)


def test_vmap_over_ids():
    ids = torch.stack([IDX, OTHER])
    agree(lambda model: vmap(lambda idx: model(idx)[0])(ids))


def test_vmap_over_ids_and_targets():
    ids, targets = torch.stack([IDX, OTHER]), torch.stack([TARGETS, TARGETS.flip(0)])
    agree(lambda model: vmap(lambda idx, y: model(idx, y)[1])(ids, targets))


def test_vmap_over_targets_alone():
    targets = torch.stack([TARGETS, TARGETS.flip(0)])
    agree(lambda model: vmap(lambda y: model(IDX, y))(targets))


@pytest.mark.parametrize("return_logits", [True, False])
def test_vmap_over_weights(return_logits):
    """Several models as one."""

    def run(model):
        model.config.return_logits = return_logits
        params, _ = stack_module_state([model])
        several = {name: torch.cat([p, p * 0.5]).detach() for name, p in params.items()}

        def loss(weights):
            return functional_call(model, weights, (IDX, TARGETS))[1]

        return vmap(loss)(several)

    agree(run)


@pytest.mark.parametrize("return_logits", [True, False])
def test_a_gradient_per_sample(return_logits):
    def run(model):
        model.config.return_logits = return_logits
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, idx, y):
            return functional_call(model, weights, (idx[None], y[None]))[1]

        return vmap(grad(loss), in_dims=(None, 0, 0))(weights, IDX, TARGETS)

    agree(run)


def test_forward_mode():
    def run(model):
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights):
            return functional_call(model, weights, (IDX, TARGETS))[1]

        with sdpa_kernel(SDPBackend.MATH):  # the one that PyTorch can differentiate forward
            return torch.func.jvp(loss, (weights,), (weights,))

    agree(run)


@pytest.mark.parametrize("return_logits", [True, False])
def test_batched_incoming_gradients(return_logits):
    """Refused in words by the fused path, computed by PyTorch's own ops."""

    def run(model):
        model.config.return_logits = return_logits
        several = torch.tensor([1.0, -2.0])
        loss = model(IDX, TARGETS)[1]
        return torch.autograd.grad(loss, list(model.parameters()), several, is_grads_batched=True)

    with pytest.raises(RuntimeError, match=r"one incoming gradient at a time.*use_backend"):
        run(both()[0])
    with use_backend("torch"):
        agree(run)


def test_the_gradient_of_the_logits_is_the_callers():
    """It may be written to, and a second backward through the same graph does not notice."""

    def run(model):
        logits, loss = model(IDX, TARGETS)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        kept = first.clone()
        first.zero_()
        return [kept, *torch.autograd.grad(loss, list(model.parameters()))]

    agree(run)


def test_functional_call():
    def run(model):
        weights = {name: p.detach() / 2 for name, p in model.named_parameters()}
        return functional_call(model, weights, (IDX, TARGETS))

    agree(run)


def test_inference_mode():
    def run(model):
        with torch.inference_mode():
            return [t.clone() for t in model(IDX, TARGETS)]

    agree(run)
