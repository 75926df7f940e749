"""torch.compile of a changed model: what nanoGPT would compute after the same change.

A change comes before the first call, or after it: then Dynamo has a graph of the model as it was,
and must see that this is the graph of another. Each changes the loss, else it would show nothing.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastgpt import GPT, GPTConfig, use_backend
from tests.close import DEVICE
from tests.marks import slow
from tests.model.test_compile import Compiler

WIDTH = 32


def _twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


class _Relu(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def _masked(model: GPT) -> None:
    attention = model.transformer.h[0].attn
    attention.register_buffer("bias", torch.eye(24, device=DEVICE).expand(1, 1, 24, 24))
    attention.flash = False


def _narrow(model: GPT) -> None:
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = nn.Linear(WIDTH, 16, bias=False, device=DEVICE)
    mlp.c_proj = nn.Linear(16, WIDTH, device=DEVICE)


def _other_weights(model: GPT) -> None:
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.ones(48, WIDTH, device=DEVICE))
    model.transformer.h[0].mlp.c_fc.bias = None
    model.transformer.h[0].mlp.c_proj.weight = nn.Parameter(torch.ones(WIDTH, 48, device=DEVICE))


def _attribute(path: str, value: Any) -> Callable[[GPT], None]:
    owner, name = path.rsplit(".", 1)
    return lambda model: setattr(model.get_submodule(owner), name, value)


MLP = "transformer.h.0.mlp"
CHANGES: dict[str, Callable[[GPT], Any]] = {
    "forward": _attribute(f"{MLP}.forward", lambda x: 3 * x),
    "class": _attribute(f"{MLP}.gelu.__class__", _Relu),
    "module": _attribute(f"{MLP}.gelu", nn.Sigmoid()),
    "heads": _attribute("transformer.h.0.attn.n_head", 2),
    "tanh": _attribute(f"{MLP}.gelu.approximate", "tanh"),
    "mask": _masked,
    "shapes": _narrow,
    "weights": _other_weights,
    "bound method": lambda m: setattr(
        m.get_submodule(MLP), "forward", MethodType(lambda _, x: 3 * x, m.get_submodule(MLP))
    ),
    "head": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach() * 2)),
    "embedding": lambda m: setattr(m.transformer.wte, "weight", nn.Parameter(m.lm_head.weight * 2)),
    "dropout": lambda m: setattr(m.transformer.h[0].mlp.dropout, "p", 1.0),
}
HOOKS: dict[str, Callable[[GPT], Any]] = {
    "hook": lambda m: m.transformer.h[0].mlp.c_fc.register_forward_hook(_twice),
    "pre-hook": lambda m: m.transformer.ln_f.register_forward_pre_hook(lambda _, x: (x[0].abs(),)),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(_twice),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch.compiler.reset()


def small(**changes: Any) -> GPT:
    """With weights large enough that every part of it matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 33, 1, 1, WIDTH, **changes)).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return model


def step(forward: Any, model: GPT) -> list[Tensor]:
    """Loss and gradients of one batch, the same each time."""
    idx = torch.arange(10, device=DEVICE).view(2, 5)
    loss = forward(idx, idx.flip(1))[1]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


def changed_after(
    change: Callable[[GPT], Any],
) -> tuple[list[Tensor], list[Tensor], GPT, Compiler]:
    """What a compiled model computes before and after the change."""
    model, compiler = small(), Compiler()
    compiled = torch.compile(model, backend=compiler)
    before = step(compiled, model)
    torch.manual_seed(1)
    change(model)
    return before, step(compiled, model), model, compiler


def another_class_is_unseen() -> bool:
    """Whether Dynamo goes on with its graph of a plain module, whatever the model."""
    module, x = nn.Sequential(nn.GELU()), -torch.ones(3)
    compiled = torch.compile(module, backend="eager")
    compiled(x)
    module[0].__class__ = _Relu
    return not torch.equal(compiled(x), module(x))


QUICK = "forward", "weights", "dropout"


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CHANGES])
def test_a_change_after_compiling(name):
    if name == "class" and another_class_is_unseen():
        pytest.skip("this PyTorch compiles no second graph for another class, whatever the model")
    with use_backend("triton"):
        before, after, model, compiler = changed_after(CHANGES[name])
    assert "fastgpt.add_layer_norm_forward.default" in compiler.operators  # it is the fused path
    with use_backend("torch"):
        torch.testing.assert_close(after, step(model, model), atol=1e-4, rtol=1e-4)
    assert (after[0] - before[0]).abs() > 1e-5  # what tanh for erf does to it


@pytest.mark.parametrize("name", ["head", slow("embedding")])
def test_a_tie_undone_after_compiling(name):
    """Where the compiler gets the modules; nanoGPT's own are not seen to change by PyTorch 2.6."""
    with use_backend("torch"):
        before, after, model, _ = changed_after(CHANGES[name])
        torch.testing.assert_close(after, step(model, model), atol=1e-4, rtol=1e-4)
    assert (after[0] - before[0]).abs() > 1e-3


@pytest.mark.parametrize("name", [*HOOKS, "module", "forward"])
def test_a_change_before_compiling(name):
    """With fullgraph: what stays of the fused path is one graph with the changed module in it."""
    model = small()
    with use_backend("torch"):
        unchanged = step(model, model)[0]
    (CHANGES | HOOKS)[name](model)
    with use_backend("triton"):
        found = step(torch.compile(model, backend="eager", fullgraph=True), model)
    with use_backend("torch"):
        torch.testing.assert_close(found, step(model, model), atol=1e-4, rtol=1e-4)
    assert (found[0] - unchanged).abs() > 1e-3


@pytest.mark.parametrize("name", ["hook", slow("pre-hook"), slow("hook on the head")])
def test_a_hook_after_compiling(name):
    """PyTorch looks for new hooks where it is told to: for any model, and so for this."""
    guarded = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    with guarded, use_backend("triton"):
        before, after, model, _ = changed_after(HOOKS[name])
    with use_backend("torch"):
        torch.testing.assert_close(after, step(model, model), atol=1e-4, rtol=1e-4)
    assert (after[0] - before[0]).abs() > 1e-3


def test_a_frozen_weight_gets_no_gradient():
    with use_backend("triton"):
        before, after, *_ = changed_after(
            lambda m: m.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
        )
    assert len(after) == len(before) - 1
    torch.testing.assert_close(after[0], before[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_pytorchs_function_replaced(monkeypatch, when):
    """F.gelu as a script may set it: "triton" says so, as it does without torch.compile."""
    model = small()
    compiled = torch.compile(model, backend="eager")
    with use_backend("triton"):
        if when == "after":
            step(compiled, model)
        monkeypatch.setattr(F, "gelu", lambda x, approximate="none": F.relu(x))
        with pytest.raises(RuntimeError, match=r"gelu is not PyTorch's own"):
            step(compiled, model)


def test_hooks_on_all_modules():
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return 2 * output if isinstance(module, nn.GELU) else None

    model = small()
    with use_backend("torch"):
        before = step(model, model)[0]
    handle = nn_module.register_module_forward_hook(hook)
    try:
        with use_backend("triton"):
            found = step(torch.compile(model.forward, backend="eager"), model)
        with use_backend("torch"):
            torch.testing.assert_close(found, step(model, model), atol=1e-4, rtol=1e-4)
    finally:
        handle.remove()
    assert (found[0] - before).abs() > 1e-3
