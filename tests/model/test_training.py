"""Training on the kernels: PyTorch's loss curve, the same bits at every run, nothing written to.

What one step computes is in test_backend.py, and a second backward in test_compile.py.
"""

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastgpt import GPT, GPTConfig, use_backend
from tests.close import DEVICE, EPS_BUDGET

T, V = 16, 17
# a minute and more in the interpreter, hence for `make test-deep`
STEPS = 200 if DEVICE == "cuda" or os.environ.get("FASTGPT_DEEP") == "1" else 20


def tiny(**changes: Any) -> GPT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_size": T, "vocab_size": V, "n_layer": 1, "n_head": 2}
    return GPT(GPTConfig(**{**sizes, "n_embd": 32, **changes})).to(DEVICE)


def batch(step: int = 0, B: int = 1) -> tuple[Tensor, Tensor]:
    """Windows of the squares modulo V: what comes next can be learned."""
    starts = torch.randint(V, (B, 1), generator=torch.Generator().manual_seed(step))
    rows = (starts + torch.arange(T + 1)).square().remainder(V).to(DEVICE)
    return rows[:, :-1], rows[:, 1:]


def gradients(model: GPT) -> dict[str, Tensor]:
    """Those of one backward, taken off the model."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def curve(backend: str, model: GPT, dtype: torch.dtype = torch.float32) -> Tensor:
    """The loss of every step, in `dtype`'s autocast and with its loss scaling."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    with use_backend(backend):
        for step in range(STEPS):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                _, loss = model(*batch(step))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach().double())
    return torch.stack(losses)


GPU_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has neither bf16 nor TF32")
PRECISIONS = [
    pytest.param(torch.float32, "highest", id="fp32"),
    pytest.param(torch.float32, "high", id="TF32", marks=GPU_ONLY),
    pytest.param(torch.float16, "highest", id="fp16 and GradScaler"),
    pytest.param(torch.bfloat16, "highest", id="bf16", marks=GPU_ONLY),
]


@pytest.mark.parametrize("dtype, matmul_precision", PRECISIONS, indirect=["matmul_precision"])
def test_loss_curve(dtype, matmul_precision):
    """Off the float64 curve by no more than close.py allows an op."""
    exact = curve("torch", tiny().double())
    eager, ours = (curve(backend, tiny(), dtype) for backend in ("torch", "triton"))
    allowed = EPS_BUDGET[dtype] * torch.finfo(dtype).eps * exact.max()
    # twice is for rounding; in TF32 two backends of SDPA differ by more than one from itself
    allowed += (3 if matmul_precision == "high" else 2) * (eager - exact).abs().max()
    error = (ours - exact).abs().max()
    assert error <= allowed < 0.1 * (exact[0] - exact[-1]), f"{error:.2e} > {allowed:.2e}"


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, (idx, targets) = tiny(), batch(B=8)
    with use_backend("triton"):
        model(idx, targets)[1].backward()
        whole = gradients(model)
        for part in zip(idx.split(2), targets.split(2), strict=True):
            (model(*part)[1] / 4).backward()
    torch.testing.assert_close(gradients(model), whole)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_the_dropout(use_reentrant):
    model = tiny(n_layer=2, dropout=0.3)
    forwards = [block.forward for block in model.transformer.h]
    with use_backend("triton"):
        for block, forward in zip(model.transformer.h, forwards, strict=True):
            block.forward = functools.partial(forward)  # so that neither run is a fused one
        torch.manual_seed(1)
        model(*batch())[1].backward()
        expected = gradients(model)
        for block, forward in zip(model.transformer.h, forwards, strict=True):
            block.forward = functools.partial(checkpoint, forward, use_reentrant=use_reentrant)
        torch.manual_seed(1)
        model(*batch())[1].backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_two_layers_and_two_calls_drop_different_scores():
    first, second = (block.attn for block in tiny(n_layer=2, dropout=0.3).transformer.h)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, T, 32, device=DEVICE)
    for attn in (first, second):
        attn.resid_dropout.p = 0.0  # PyTorch's; the kernels' is what is looked at

    def outputs(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [attn(x) for attn in (first, second, first)]

    with use_backend("triton"):
        a, b, c = outputs(1)
        assert not torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(b, c)
        assert all(torch.equal(t, again) for t, again in zip((a, b, c), outputs(1), strict=True))
        assert not any(
            torch.equal(t, other) for t, other in zip((a, b, c), outputs(2), strict=True)
        )


def test_twenty_runs_give_the_same_bits():
    model = tiny(dropout=0.1)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(1)
        logits, loss = model(*batch())
        loss.backward()
        return {"logits": logits, "loss": loss, **gradients(model)}

    with use_backend("triton"):
        first = run()
        for _ in range(19):
            torch.testing.assert_close(run(), first, rtol=0, atol=0)


def nodes(root: Node) -> set[Node]:
    """The autograd graph below `root`."""
    found, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [below for below, _ in node.next_functions]
    return found


def test_a_step_writes_to_nothing_it_was_given():
    """Inputs, weights, saved tensors and incoming gradients keep their values, and their versions,
    by which autograd would notice. One exception: the tied weight's gradient, which the head makes
    for the embedding alone, to be added to (fused/embedding.py)."""
    model, (idx, targets) = tiny(dropout=0.1), batch()
    watched: list[tuple[Tensor, int, Tensor]] = []
    tied: list[Tensor] = []

    def watch(t: Tensor) -> Tensor:
        watched.append((t, t._version, t.detach().clone()))
        return t

    def watch_incoming(grads: tuple[Tensor | None, ...]) -> None:
        for g in grads:
            if g is not None:
                watch(g)

    for t in (idx, targets, *model.parameters()):
        watch(t)
    with use_backend("triton"), saved_tensors_hooks(watch, lambda t: t):
        _, loss = model(idx, targets)
        for node in nodes(loss.grad_fn):
            node.register_prehook(watch_incoming)
            if node.name() == "_EmbedBackward":
                node.register_prehook(lambda grads: tied.append(grads[1]))
        loss.backward()
    (shared,) = (t.untyped_storage().data_ptr() for t in tied)
    for t, version, value in watched:
        if t.untyped_storage().data_ptr() != shared:
            assert t._version == version and torch.equal(t, value)


def finite(model: GPT, backend: str, incoming: float = 1.0) -> dict[str, Tensor]:
    """Which elements are finite, of the logits, the loss and every gradient."""
    with use_backend(backend):
        logits, loss = model(*batch())
        (incoming * loss).backward()
    results = {"logits": logits, "loss": loss, **gradients(model)}
    return {name: t.isfinite() for name, t in results.items()}


def assert_shows_what_pytorch_shows(model: GPT, incoming: float = 1.0) -> None:
    eager, ours = (finite(model, backend, incoming) for backend in ("torch", "triton"))
    assert not all(t.all() for t in eager.values())
    for name in eager:
        # the kernels may show more: SDPA on a CPU makes zeros of a row of infinitely low scores
        assert not (ours[name] & ~eager[name]).any(), name


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["h.0.ln_1", "h.0.attn.c_attn", "h.0.mlp.c_fc", "ln_f"])
def test_what_is_not_finite_shows(layer, value):
    model = tiny()
    with torch.no_grad():
        model.transformer.get_submodule(layer).weight.view(-1)[0] = value
    assert_shows_what_pytorch_shows(model)


def test_an_overflowing_loss_scale_shows():
    """GradScaler skips a step by the gradients that are not finite."""
    assert_shows_what_pytorch_shows(tiny(), incoming=float("inf"))
