"""fastgpt's own training step: its AdamW against PyTorch's, and the step against nanoGPT's loop."""

import functools

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.optim import AdamW
from fastgpt.train_step import TrainStep, _explained
from tests.close import DEVICE
from tests.marks import slow

IMPLEMENTATIONS = ["torch", "triton"]
BETAS = (0.9, 0.95)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5000,), (3, 7), (1,))
    return [nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]


def groups(params: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": params[2:], "weight_decay": 0.0},
    ]


def gradients(step: int, params: list[nn.Parameter], scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(DEVICE)


def pytorchs(steps: range, max_norm: float, params: list[nn.Parameter]) -> torch.optim.AdamW:
    """What nanoGPT does."""
    optimizer = torch.optim.AdamW(groups(params), lr=1e-2, betas=BETAS)
    for step in steps:
        gradients(step, params)
        if max_norm:
            nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("mode", IMPLEMENTATIONS)
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_adamw_is_clipping_and_pytorchs(mode, max_norm, loss_scale):
    theirs = parameters()
    pytorchs(range(4), max_norm, theirs)
    ours = parameters()
    copies = {p: torch.full_like(p, torch.nan, dtype=torch.float16) for p in ours}
    with use_backend(mode):
        optimizer = AdamW(groups(ours), 1e-2, BETAS, max_norm, copies)
        for step in range(4):
            gradients(step, ours, loss_scale or 1.0)
            if loss_scale:
                optimizer.grad_scale = torch.tensor(loss_scale, device=DEVICE)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert torch.equal(copies[a], a.half())


@pytest.mark.parametrize("mode", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(mode, bad):
    params = parameters()
    with use_backend(mode):
        optimizer = AdamW(groups(params), 1e-2, BETAS, 1.0)
        gradients(0, params)
        optimizer.step()
        before = [p.detach().clone() for p in params]
        moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
        gradients(1, params)
        params[0].grad[17] = bad
        optimizer.step()
    for p, was, moment in zip(params, before, moments, strict=True):
        state = optimizer.state[p]
        assert torch.equal(p, was) and torch.equal(state["exp_avg"], moment) and state["step"] == 1


@pytest.mark.parametrize("mode", IMPLEMENTATIONS)
def test_state_loads_both_ways(mode):
    whole, first, second = parameters(), parameters(), parameters()
    pytorchs(range(4), 0.0, whole)
    saved = pytorchs(range(2), 0.0, first).state_dict()
    with use_backend(mode):
        ours = AdamW(groups(first), 1e-2, BETAS)
        ours.load_state_dict(saved)
        gradients(2, first)
        ours.step()
    theirs = torch.optim.AdamW(groups(second), lr=1e-2, betas=BETAS)
    theirs.load_state_dict(ours.state_dict())
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q)
    gradients(3, second)
    theirs.step()
    for a, b in zip(second, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", IMPLEMENTATIONS)
def test_a_gradient_in_other_strides(mode):
    params = parameters()
    gradients(0, params)
    params[1].grad = params[1].grad.t().contiguous().t()
    with use_backend(mode):
        AdamW(groups(params), 1e-2, BETAS).step()
    theirs = parameters()
    pytorchs(range(1), 0.0, theirs)
    torch.testing.assert_close(params[1], theirs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_groups_are_read_at_every_step(mode, name):
    results = []
    for kind, backend in ((AdamW, mode), (torch.optim.AdamW, "torch")):
        params = parameters()
        optimizer = kind(groups(params), lr=1e-2, betas=BETAS)
        with use_backend(backend):
            for step in range(3):
                gradients(step, params)
                optimizer.step()
                optimizer.param_groups[0][name] *= 3  # and the second group keeps its own
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW"):
        AdamW(groups(parameters()), 1e-2, BETAS).step(lambda: 0.0)


def model() -> GPT:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=41, block_size=16)
    return GPT(GPTConfig(**sizes, return_logits=False)).to(DEVICE)


def batches(step: int, count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(41, (8, 1), generator=generator)
    ids = ((first + torch.arange(17)) % 41).to(DEVICE)  # each id follows from the one before
    return [(b[:, :-1], b[:, 1:]) for b in ids.split(size)[:count]]


def nanogpt_losses(steps: int, dtype: torch.dtype) -> list[float]:
    gpt = model()
    optimizer = gpt.configure_optimizers(0.1, 1e-2, BETAS, DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    for step in range(steps):
        ((x, y),) = batches(step, 1, 8)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = gpt(x, y)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_step_is_nanogpts_loop(dtype, count):
    with use_backend("torch"):
        theirs = nanogpt_losses(20, dtype)
    step = TrainStep(model(), 0.1, 1e-2, BETAS, 1.0, dtype)
    ours = [step(batches(i, count, 8 // count)).item() for i in range(20)]
    assert theirs[0] - theirs[-1] > 0.5  # it learns
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < tolerance


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("returned", [True, slow(False)], ids=["logits", "no logits"])
@pytest.mark.parametrize(
    "default",
    [
        torch.float64,
        *map(slow, (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_the_default_dtype_changes_nothing(mode, returned, default):
    results = []
    for dtype in (torch.float32, default):
        gpt = model()
        gpt.config.return_logits = returned
        step = TrainStep(gpt, 0.1, 1e-2, BETAS)
        torch.set_default_dtype(dtype)
        try:
            with use_backend(mode):
                losses = [step(batches(i, 2, 1)) for i in range(2)]
        finally:
            torch.set_default_dtype(torch.float32)
        states = [t for state in step.optimizer.state.values() for t in state.values()]
        results.append([*losses, *gpt.parameters(), *states])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_copies_follow_the_weights():
    step = TrainStep(model(), 0.1, 1e-2, BETAS, dtype=torch.bfloat16)
    step(batches(0, 1, 8))
    assert step.copies
    for p, copy in step.copies.items():
        assert torch.equal(copy, p.bfloat16())


def test_capture_needs_a_gpu():
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="capture=True needs a CUDA GPU"):
            TrainStep(model(), 0.1, 1e-2, BETAS, capture=True)
        return
    plain = TrainStep(model(), 0.1, 1e-2, BETAS, dtype=torch.bfloat16)
    captured = TrainStep(model(), 0.1, 1e-2, BETAS, dtype=torch.bfloat16, capture=True)
    for i in range(5):
        assert captured(batches(i, 2, 4)).item() == pytest.approx(plain(batches(i, 2, 4)).item())
    with pytest.raises(ValueError, match="keep the shape"):
        captured(batches(0, 1, 8))
    for step in (plain, captured):  # which the graph has not seen
        step.model.transformer.h[0].mlp.register_forward_hook(lambda m, x, y: 2 * y)
        step.model.transformer.h[1].mlp.gelu = nn.ReLU()
    for i in range(5, 8):
        assert captured(batches(i, 2, 4)).item() == pytest.approx(plain(batches(i, 2, 4)).item())


class Sign(torch.optim.AdamW):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(1e-3 * p.grad.sign())


def with_a_hook(groups, **how):
    optimizer = torch.optim.AdamW(groups, **how)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def of_some(groups, **how):
    return torch.optim.AdamW([groups[0]["params"][0]], **how)


def with_sgd(groups, lr, betas):
    return torch.optim.SGD(groups, lr)


OPTIMIZERS = [
    (with_sgd, "gave SGD: TrainStep takes AdamW's own step"),
    (Sign, "gave Sign: TrainStep takes AdamW's own step"),
    (with_a_hook, "has hooks: TrainStep takes AdamW's own step"),
    (of_some, r"left out \S+, one of 27; set requires_grad_\(False\)"),
]


@pytest.mark.parametrize(
    "make, message", OPTIMIZERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_an_optimizer_of_a_forks_is_not_taken_for_adamw(monkeypatch, make, message):
    gpt, whole = model(), GPT.configure_optimizers

    def configure(self, weight_decay, lr, betas, device_type):
        groups = whole(self, weight_decay, lr, betas, device_type).param_groups
        plain = [{k: g[k] for k in ("params", "weight_decay")} for g in groups]
        return make(plain, lr=lr, betas=betas)

    monkeypatch.setattr(GPT, "configure_optimizers", configure)
    with pytest.raises(ValueError, match=message):
        TrainStep(gpt, 0.1, 1e-2, BETAS)


@pytest.mark.parametrize(
    "put", [Sign, functools.partial(torch.optim.AdamW, eps=1e-3)], ids=["class", "partial"]
)
def test_another_adamw_in_pytorchs_place(monkeypatch, put):
    """A fork may assign one whenever it likes."""
    gpt = model()
    monkeypatch.setattr(torch.optim, "AdamW", put)
    optimizer = gpt.configure_optimizers(0.1, 1e-2, BETAS, DEVICE)
    assert type(optimizer) is (Sign if put is Sign else put.func)
    assert optimizer.defaults["eps"] == (1e-8 if put is Sign else 1e-3)


def test_a_step_that_raises_leaves_no_gradient():
    """Not even those of the batches before the one it was."""
    good, bad = batches(0, 1, 8), [(torch.full((8, 16), 41), torch.zeros(8, 16, dtype=torch.int64))]
    if DEVICE == "cuda":
        bad = [(torch.zeros(8, 17, dtype=torch.int64, device=DEVICE),) * 2]  # too long
    results = []
    for first in ([], [[*good, *bad]]):
        step = TrainStep(model(), 0.1, 1e-2, BETAS)
        for these in first:
            with pytest.raises((IndexError, ValueError)):
                step(these)
        step(batches(1, 1, 8))
        results.append(list(step.model.parameters()))
    assert all(map(torch.equal, *results))


def test_a_batch_that_does_not_fit_names_three_ways_out(monkeypatch):
    step = TrainStep(model(), 0.1, 1e-2, BETAS)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    step.forward = full
    with pytest.raises(RuntimeError, match=r"batch_size=8 .*block_size=16, or set checkpoint_bl"):
        step(batches(0, 1, 8))
    other = RuntimeError("something else")
    assert _explained(other, torch.empty(2, 3)) is None


def test_pytorchs_own_out_of_memory_error_on_a_cpu_is_one():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert "checkpoint_blocks" in str(_explained(raised.value, torch.empty(2, 3)))
