"""The model as forks and PyTorch use it: what they replace takes effect, and transforms work.

The yardstick is `plain_logits`: nanoGPT's forward written out once more, with no fused op, calling
every submodule. Whatever was put into a model takes part in it, so the model must agree with it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastgpt.model
from fastgpt import GPT, GPTConfig

B, T, V = 4, 9, 41
MLP, LN_2 = "transformer.h.0.mlp", "transformer.h.0.ln_2"


def tiny(**changes) -> GPT:
    """Two layers, with weights wide enough that every part matters."""
    sizes = {"block_size": 12, "vocab_size": V, "n_layer": 2, "n_head": 3, "n_embd": 24}
    model = GPT(GPTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    rows = torch.randint(V, (B, T + 1))
    return rows[:, :-1], rows[:, 1:]  # not contiguous, which nanoGPT's targets must be


def plain_attention(attn: Any, x: Tensor) -> Tensor:
    B, T, C = x.shape
    q, k, v = (t.view(B, T, attn.n_head, -1).transpose(1, 2) for t in attn.c_attn(x).chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(C / attn.n_head)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    p = scores.masked_fill(later, -math.inf).softmax(-1)
    y = F.dropout(p, attn.dropout, attn.training) @ v
    return attn.resid_dropout(attn.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def plain_logits(model: GPT, idx: Tensor) -> Tensor:
    parts = model.transformer
    x = parts.drop(parts.wte(idx) + parts.wpe(torch.arange(idx.size(1))))
    for block in parts.h:
        x = x + plain_attention(block.attn, block.ln_1(x))
        mlp = block.mlp
        x = x + mlp.dropout(mlp.c_proj(mlp.gelu(mlp.c_fc(block.ln_2(x)))))
    return model.lm_head(parts.ln_f(x))


def plain_loss(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(plain_logits(model, idx).flatten(0, 1), targets.flatten())


def grads_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_agrees_with_plain(model: GPT, idx: Tensor, targets: Tensor) -> None:
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, plain_logits(model, idx))
    theirs = grads_of(plain_loss(model, idx, targets), model)
    torch.testing.assert_close(grads_of(loss, model), theirs)


class LoRA(nn.Module):
    """A low-rank addition around a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def with_halved_weight(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Halved())


def with_doubled_output(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: 2 * out)
    return module


def doubling(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * forward(x)


def put(model: nn.Module, path: str, make: Callable) -> None:
    """make(old) in place of whatever is at `path`: a module, a method or a number."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, make(getattr(parent, name)))


CHANGES: dict[str, tuple[str, Callable]] = {
    "LoRA on c_fc": (f"{MLP}.c_fc", LoRA),
    "LoRA on mlp.c_proj": (f"{MLP}.c_proj", LoRA),
    "LoRA on lm_head": ("lm_head", LoRA),
    "gelu = ReLU": (f"{MLP}.gelu", lambda old: nn.ReLU()),
    "gelu = tanh GELU": (f"{MLP}.gelu", lambda old: nn.GELU("tanh")),
    "ln_2 = RMSNorm": (LN_2, lambda old: nn.RMSNorm(24)),
    "c_fc.forward patched": (f"{MLP}.c_fc.forward", doubling),
    "ln_2.forward patched": (f"{LN_2}.forward", doubling),
    "c_fc.weight parametrized": (f"{MLP}.c_fc", with_halved_weight),
    "n_head": ("transformer.h.0.attn.n_head", lambda old: 2),
    "hook on ln_2": (LN_2, with_doubled_output),
    "hook on c_fc": (f"{MLP}.c_fc", with_doubled_output),
    "hook on gelu": (f"{MLP}.gelu", with_doubled_output),
    "hook on c_proj": (f"{MLP}.c_proj", with_doubled_output),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change, batch):
    model = tiny()
    before, _ = model(*batch)
    put(model, *CHANGES[change])
    assert not torch.allclose(model(*batch)[0], before, rtol=1e-3)
    assert_agrees_with_plain(model, *batch)


def test_another_norm_under_the_name_layer_norm_takes_effect(batch, monkeypatch):
    """Forks write `model.LayerNorm = Theirs` and then build: Block must not take it for its own."""

    class Norm(nn.RMSNorm):
        def __init__(self, ndim: int, bias: bool):
            super().__init__(ndim)
            self.bias = None

    monkeypatch.setattr(fastgpt.model, "LayerNorm", Norm)
    assert_agrees_with_plain(tiny(), *batch)


def test_a_change_to_the_head_counts_without_returned_logits(batch):
    model = tiny(return_logits=False)
    put(model, "lm_head", LoRA)
    torch.testing.assert_close(model(*batch), (None, plain_loss(model, *batch)))


HOOKS: dict[str, Callable] = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "backward_pre": nn.Module.register_full_backward_pre_hook,
    "global forward": lambda _, call: nn_module.register_module_forward_hook(call),
    "global forward_pre": lambda _, call: nn_module.register_module_forward_pre_hook(call),
    "global backward": lambda _, call: nn_module.register_module_full_backward_hook(call),
    "global backward_pre": lambda _, call: nn_module.register_module_full_backward_pre_hook(call),
}


@pytest.mark.parametrize("path", [LN_2, f"{MLP}.c_fc", f"{MLP}.gelu", f"{MLP}.c_proj"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # on wte: ids have no gradient
def test_a_hook_fires_and_changes_nothing(kind, path, batch):
    model = tiny()
    expected = grads_of(model(*batch)[1], model)
    hooked, seen = model.get_submodule(path), []
    handle = HOOKS[kind](hooked, lambda module, *args: seen.append(module))
    try:
        grads = grads_of(model(*batch)[1], model)
    finally:
        handle.remove()  # a global hook would outlive the test
    assert seen.count(hooked) == 1
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("config", [{}, {"bias": False}, {"gelu": "tanh"}, {"n_head": 1}], ids=str)
@pytest.mark.parametrize("length", [1, T, 12])  # 12 is block_size
def test_logits_and_gradients(config, length):
    rows = torch.randint(V, (B, length + 1))
    assert_agrees_with_plain(tiny(**config), rows[:, :-1], rows[:, 1:])


def test_without_targets_only_the_last_position(batch):
    model = tiny()
    last, loss = model(batch[0])
    assert loss is None and last.shape == (B, 1, V)
    torch.testing.assert_close(last, model(*batch)[0][:, -1:])


def test_ignored_targets_do_not_count(batch):
    model, (idx, targets) = tiny(), batch
    targets = targets.clone()
    targets[0], targets[2, ::2] = -1, -1
    counted = targets != -1
    logits, loss = model(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits[counted], targets[counted]))


def test_all_targets_ignored_is_nan_with_zero_gradients(batch):
    model = tiny()
    _, loss = model(batch[0], torch.full((B, T), -1))
    assert loss.isnan()
    assert all(g.count_nonzero() == 0 for g in grads_of(loss, model).values())


def test_an_empty_batch(batch):
    model, (idx, targets) = tiny(), batch
    assert model(idx[:0])[0].shape == (0, 1, V)
    logits, loss = model(idx[:0], targets[:0])
    assert logits.shape == (0, T, V) and loss.isnan()  # the mean of nothing


def test_without_returned_logits_the_same_loss_and_gradients(batch):
    model = tiny()
    _, loss = model(*batch)
    model.config.return_logits = False
    logits, same = model(*batch)
    assert logits is None and model(batch[0])[0] is not None  # sampling still needs them
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(grads_of(same, model), grads_of(loss, model))


DROPOUTS = ["transformer.drop.p", "transformer.h.0.attn.dropout"]
DROPOUTS += ["transformer.h.1.attn.resid_dropout.p", f"{MLP}.dropout.p", "everywhere"]


@pytest.mark.parametrize("where", DROPOUTS)
def test_dropout_draws_what_nanogpt_draws_and_only_in_training(where, batch):
    model = tiny(dropout=0.3 if where == "everywhere" else 0.0)
    if where != "everywhere":
        put(model, where, lambda old: 0.3)
    torch.manual_seed(1)
    ours, _ = model(*batch)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, plain_logits(model, batch[0]))
    first, second = model.eval()(*batch)[0], model(*batch)[0]
    assert torch.equal(first, second) and not torch.allclose(first, ours, rtol=1e-3)


def test_accumulated_gradients(batch):
    model, rows = tiny(), torch.randint(V, (8, T + 1))
    whole = grads_of(model(rows[:, :-1], rows[:, 1:])[1], model)
    for part in rows.split(2):
        (model(part[:, :-1], part[:, 1:])[1] / 4).backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, whole)


def test_a_second_backward_through_a_retained_graph(batch):
    model = tiny()
    _, loss = model(*batch)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    again = grads_of(loss, model)
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(dropout, use_reentrant, batch):
    model = tiny(dropout=dropout)
    torch.manual_seed(1)
    expected = grads_of(model(*batch)[1], model)
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=use_reentrant)
    torch.manual_seed(1)
    model(*batch)[1].backward()  # the reentrant kind refuses autograd.grad
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


def test_float64(batch):
    model = tiny().double()
    assert model(*batch)[1].dtype == torch.float64
    assert_agrees_with_plain(model, *batch)  # to assert_close's 1e-7 for float64


def test_bfloat16_weights(batch):
    """As accurate as the plain computation in bf16; the loss is fp32, which nanoGPT's is not."""
    model = tiny()
    truth, _ = model(*batch)
    logits, loss = model.bfloat16()(*batch)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    plain_error = (plain_logits(model, batch[0]) - truth).abs().max()
    assert (logits - truth).abs().max() <= 2 * plain_error
    exact = F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())
    torch.testing.assert_close(loss, exact)


def test_autocast_keeps_the_residual_stream_and_the_loss_in_fp32(batch):
    model, dtypes = tiny(), {}
    truth, _ = model(*batch)
    for path in ("transformer.h.0", "transformer.h.0.attn", MLP):
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: dtypes.update({path: out.dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(*batch)
        plain_error = (plain_logits(model, batch[0]) - truth).abs().max()
    low, full = torch.bfloat16, torch.float32
    assert dtypes == {"transformer.h.0": full, "transformer.h.0.attn": low, MLP: low}
    assert (logits.dtype, loss.dtype) == (low, full)
    assert (logits - truth).abs().max() <= 2 * plain_error
    assert all(g.dtype == full for g in grads_of(loss, model).values())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # SDPA, one sample at a time
def test_per_sample_gradients_through_torch_func(batch):
    model = tiny()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(params, idx, targets):
        return functional_call(model, params, (idx[None], targets[None]))[1]

    together = vmap(grad(loss_of), in_dims=(None, 0, 0))(params, *batch)
    for i in range(B):
        alone = grads_of(model(batch[0][i : i + 1], batch[1][i : i + 1])[1], model)
        torch.testing.assert_close({name: g[i] for name, g in together.items()}, alone)


def test_compiles_to_one_graph_for_training_and_one_for_sampling(batch):
    # all of torch.compile but inductor's code generation: a minute here, and none of it is ours
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    logits, loss = compiled(*batch)
    expected_logits, expected_loss = model(*batch)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(grads_of(loss, model), grads_of(expected_loss, model))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch[0])[0], model(batch[0])[0])
    assert counter.frame_count == 2
