"""What people do to an optimizer: odd layouts, options, hooks, copies, wrong state. As PyTorch's
plain AdamW does it, or refused by name.
"""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.optim import AdamW, CheckedAdamW
from fastgpt.train_step import TrainStep
from tests.close import DEVICE
from tests.model.test_train_step import BETAS, batches, gradients, groups, model, parameters

OURS = {
    "checked": ("auto", CheckedAdamW),
    "engine": ("auto", AdamW),
    "kernels": ("triton", AdamW),
}
every_optimizer = pytest.mark.parametrize("which", OURS)


def made(which: str, params: list[nn.Parameter], **options) -> torch.optim.AdamW:
    kind = OURS[which][1]
    how = dict(fused=True) if kind is CheckedAdamW else {}
    optimizer = kind(groups(params), lr=1e-2, betas=BETAS, **how)
    for group in optimizer.param_groups:
        group.update(options)
    return optimizer


def plain(params: list[nn.Parameter], **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(params), lr=1e-2, betas=BETAS, foreach=False, **options)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def with_gaps(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _transposed_weight(params, optimizer):
    params[1].data = transposed(params[1].data)


def _weight_with_gaps(params, optimizer):
    params[1].data = with_gaps(params[1].data)


def _transposed_moments(params, optimizer):
    state = optimizer.state_dict()
    state["state"][1]["exp_avg"] = transposed(state["state"][1]["exp_avg"])
    optimizer.load_state_dict(state)


def _another_group(params, optimizer):
    params.append(nn.Parameter(torch.ones(2, 2, device=DEVICE)))
    optimizer.add_param_group({"params": params[-1:], "weight_decay": 0.5, "betas": (0.5, 0.6)})


def _one_without_a_gradient(params, optimizer):
    params[0].requires_grad_(False)


def _tensor_lr(params, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)


def _maximize(params, optimizer):
    for group in optimizer.param_groups:
        group["maximize"] = True


def _other_eps(params, optimizer):
    optimizer.param_groups[1]["eps"] = 1e-2


def _copied(params, optimizer):
    return copy.deepcopy(optimizer)


def _pickled(params, optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = [
    _transposed_weight,
    _weight_with_gaps,
    _transposed_moments,
    _another_group,
    _one_without_a_gradient,
    _tensor_lr,
    _maximize,
    _other_eps,
    _copied,
    _pickled,
]


@every_optimizer
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", [0, 2], ids=["before the first step", "after two"])
def test_as_plain_adamw(which, change, after):
    results = []
    for make in (lambda params: made(which, params), plain):
        params = parameters()
        optimizer = make(params)
        with use_backend("torch" if make is plain else OURS[which][0]):
            for step in range(4):
                if step == after and (after or change is not _transposed_moments):
                    optimizer = change(params, optimizer) or optimizer
                    params = [p for group in optimizer.param_groups for p in group["params"]]
                gradients(step, params)
                for p in params:
                    p.grad = p.grad if p.requires_grad else None
                optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_optimizer
def test_amsgrad(which):
    results = []
    for make, options in ((made, dict(which=which)), (plain, {})):
        params = parameters()
        with use_backend(OURS[which][0]):
            optimizer = make(params=params, **options)
            for group in optimizer.param_groups:
                group["amsgrad"] = True
            for step in range(3):
                gradients(step, params, 3.0 - step)
                optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_optimizer
def test_hooks_run_once_a_step(which):
    params, calls = parameters(), []
    plain(params)  # whose making wraps torch.optim.AdamW.step in hooks
    optimizer = made(which, params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    gradients(0, params)
    with use_backend(OURS[which][0]):
        optimizer.step()
    assert calls == ["before", "after"]


def _wrong_shape(state):
    state["exp_avg"] = state["exp_avg"][:-1].clone()


def _scalar(state):
    state["exp_avg_sq"] = torch.zeros(())


def _number(state):
    state["exp_avg_sq"] = 0.0


def _missing(state):
    del state["exp_avg"]


def _many_steps(state):
    state["step"] = torch.zeros(3)


WRONG = [_wrong_shape, _scalar, _number, _missing, _many_steps]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("engine", [True, False], ids=["engine", "configure_optimizers"])
@pytest.mark.parametrize("how", ["load", "poke"])
def test_state_that_does_not_fit_is_refused_by_name(wrong, engine, how):
    step = TrainStep(model(), 0.1, 1e-2, BETAS)
    step(batches(0, 1, 8))
    optimizer = step.optimizer
    if not engine:
        state = optimizer.state_dict()
        optimizer = step.model.configure_optimizers(0.1, 1e-2, BETAS, DEVICE)
        optimizer.load_state_dict(state)
    good = copy.deepcopy(optimizer.state_dict())
    p = step.model.transformer.h[1].attn.c_attn.weight
    p.grad = torch.ones_like(p)
    name = r"transformer\.h\.1\.attn\.c_attn\.weight"
    if how == "poke":
        wrong(optimizer.state[p])
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        return
    params = [q for group in optimizer.param_groups for q in group["params"]]
    (index,) = (i for i, q in enumerate(params) if q is p)
    bad = copy.deepcopy(good)
    wrong(bad["state"][index])
    with pytest.raises(ValueError, match=name):
        optimizer.load_state_dict(bad)
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["exp_avg"], good["state"][key]["exp_avg"])
    optimizer.step()


def test_a_sparse_gradient_is_refused_by_name():
    params = parameters()
    params[1].grad = torch.zeros_like(params[1]).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 has a sparse gradient"):
        AdamW(groups(params), 1e-2, BETAS).step()


def _clip(gpt):
    for p in gpt.parameters():
        p.clamp_(-0.01, 0.01)


def _load(gpt):
    gpt.load_state_dict({name: t * 1.5 for name, t in gpt.state_dict().items()})


def _assign(gpt):
    gpt.load_state_dict({name: t * 1.5 for name, t in gpt.state_dict().items()}, assign=True)


def _other_storage(gpt):
    for p in gpt.parameters():
        p.data = p.data * 1.5


def _transpose_all(gpt):
    for p in gpt.parameters():
        if p.dim() == 2:
            p.data = transposed(p.data * 1.5)


def _new_position_embeddings(gpt):
    gpt.transformer.wpe.weight = nn.Parameter(gpt.transformer.wpe.weight * 1.5)


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize(
    "edit", [_clip, _load, _assign, _other_storage, _transpose_all, _new_position_embeddings]
)
def test_the_next_step_sees_weights_that_were_edited(mode, edit):
    dtype = torch.bfloat16 if mode == "auto" or DEVICE == "cuda" else torch.float16
    if dtype == torch.float16 and edit is _assign:
        pytest.skip("GradScaler refuses a step in which no parameter of the optimizer took part")
    step = TrainStep(model(), 0.1, 1e-2, BETAS, dtype=dtype)
    with use_backend(mode):
        for i in range(2):
            step(batches(i, 1, 1))
        with torch.no_grad():
            edit(step.model)
        ((x, y),) = batches(2, 1, 1)
        with torch.autocast(DEVICE, dtype):
            expected = step.model(x, y)[1].item()
        assert step([(x, y)]).item() == pytest.approx(expected, rel=1e-5)
        step(batches(3, 1, 1))
    for p, low in step.copies.items():
        assert torch.equal(low, p.to(dtype))


@pytest.mark.parametrize("width", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["plain", "autocast"])
def test_models_of_another_dtype(width, dtype):
    step, gpt = TrainStep(model().to(width), 0.1, 1e-2, BETAS, dtype=dtype), model().to(width)
    optimizer = torch.optim.AdamW(
        gpt.configure_optimizers(0.1, 1e-2, BETAS, DEVICE).param_groups, fused=False
    )
    for i in range(3):
        ((x, y),) = batches(i, 1, 8)
        with use_backend("torch"), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = gpt(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tolerance = 1e-9 if width == torch.float64 else 2e-2
        assert step([(x, y)]).item() == pytest.approx(loss.item(), rel=tolerance)


@pytest.mark.parametrize("max_skipped", [0, 3, 25])
def test_gradients_that_are_never_finite_are_not_passed_over_in_silence(max_skipped):
    gpt = model()
    with torch.no_grad():
        gpt.transformer.ln_f.weight[0] = float("nan")
    step = TrainStep(gpt, 0.1, 1e-2, BETAS, max_skipped=max_skipped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(30):
            try:
                step(batches(0, 1, 2))
            except FloatingPointError as error:
                assert f"max_skipped={max_skipped}" in str(error)
                assert i + 1 == max_skipped
                break
        else:
            assert max_skipped == 0
    told = [w for w in caught if "20 steps in a row were skipped" in str(w.message)]
    assert len(told) == (max_skipped != 3)


def test_an_error_is_not_its_own_cause():
    step = TrainStep(model(), 0.1, 1e-2, BETAS)

    def fails(*args, **kwargs):
        raise RuntimeError("something else")

    step.forward = fails
    with pytest.raises(RuntimeError, match="something else") as raised:
        step(batches(0, 1, 8))
    assert raised.value.__cause__ is None


def test_copies_of_a_step_train_on_alone():
    step = TrainStep(model(), 0.1, 1e-2, BETAS, dtype=torch.bfloat16)
    step(batches(0, 1, 8))
    other = copy.deepcopy(step)
    a, b = (s(batches(1, 1, 8)).item() for s in (step, other))
    assert a == b and step(batches(2, 1, 8)).item() == other(batches(2, 1, 8)).item()


def test_a_models_optimizer_is_torchs():
    optimizer = GPT(GPTConfig(8, 23, 1, 2, 16)).configure_optimizers(0.1, 1e-2, BETAS, DEVICE)
    assert isinstance(optimizer, torch.optim.AdamW)
