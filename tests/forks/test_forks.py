"""What forks add to the model and the fused paths must not lose."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import GPT, GPTConfig, ops
from fastgpt.implementations import sdpa
from tests.forks import nanogpt

SIZES = {"block_size": 8, "vocab_size": 23, "n_layer": 1, "n_head": 2, "n_embd": 32}


def test_a_bias_in_the_head_counts_without_returned_logits():
    model = GPT(GPTConfig(**SIZES))
    model.lm_head.bias = nn.Parameter(torch.arange(23) / 10)
    idx = torch.randint(23, (2, 8))
    _, loss = model(idx, idx)
    model.config.return_logits = False
    torch.testing.assert_close(model(idx, idx), (None, loss))


def test_a_config_without_our_fields():
    """nanoGPT's own GPTConfig, passed on by a script that imports it from there."""
    theirs = SimpleNamespace(**SIZES, dropout=0.0, bias=True)
    torch.manual_seed(1)
    model = GPT(theirs)  # type: ignore[arg-type]
    torch.manual_seed(1)
    for ours, same in zip(model.parameters(), GPT(GPTConfig(**SIZES)).parameters(), strict=True):
        assert torch.equal(ours, same)


def test_buffers_of_the_models_own_are_loaded():
    """A mask that a fork registered, and a wrapper that calls what it wraps `module`."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module
            self.register_buffer("mask", torch.ones(3))

        def forward(self, x):
            return self.module(x)

    model = GPT(GPTConfig(**SIZES))
    model.transformer.h[0].attn.register_buffer("bias", torch.ones(8, 8).tril())
    model.transformer.h[0].mlp.c_fc = Wrapper(model.transformer.h[0].mlp.c_fc)
    saved = {name: t.clone() + 1 for name, t in model.state_dict().items()}
    model.load_state_dict(saved)
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())


def test_a_wrapper_with_a_weight_beside_what_it_wraps():
    """Both end in `c_fc.weight` once `module` is taken out of the names."""

    class Doubled(nn.Linear):
        def __init__(self, module: nn.Linear):
            super().__init__(32, 128)
            self.module = module

        def forward(self, x):
            return super().forward(x) + self.module(x)

    model = GPT(GPTConfig(**SIZES))
    model.transformer.h[0].mlp.c_fc = Doubled(model.transformer.h[0].mlp.c_fc)
    saved = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    saved["transformer.wte.weight"] = saved["lm_head.weight"]
    for prefix in ("", "module.", "_orig_mod.module."):
        model.load_state_dict({prefix + name: t for name, t in saved.items()})
        assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.zero_()
            model.transformer.h[0].mlp.c_fc.module.weight.zero_()


def test_an_error_in_a_hook_is_the_callers_own():
    def hook(*_):
        raise IndexError("mine")

    model = GPT(GPTConfig(**SIZES))
    model.transformer.wte.register_forward_hook(hook)
    with pytest.raises(IndexError, match=r"^mine$"):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_no_layers_and_any_temperature():
    sizes = SIZES | {"n_layer": 0}
    torch.manual_seed(4)
    model = GPT(GPTConfig(**sizes))
    torch.manual_seed(4)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**sizes))
    theirs.load_state_dict(model.state_dict())
    idx = torch.randint(23, (2, 8))
    torch.testing.assert_close(model(idx, idx), theirs(idx, idx))
    for temperature in (math.inf, torch.tensor([[0.3], [2.0]]), torch.tensor(0.7)):
        tokens = []
        for gpt in (model, theirs):
            torch.manual_seed(1)
            tokens.append(gpt.generate(idx[:, :2], 9, temperature=temperature, top_k=4))
        assert torch.equal(*tokens)


def test_autocast_remembers_weights_where_pytorch_runs():
    """Cast once per weight and context, as eager does, not at every call of an op."""
    x, w = torch.randn(2, 16), torch.randn(64, 16)
    casts = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            casts.append(function is torch.Tensor.to)
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Count():
        y = ops.linear_gelu(x, w)
    assert y.dtype == torch.bfloat16 and not any(casts)


def test_sdpa_held_to_one_backend_computes_attention():
    """SDPA's flash kernel exists on a CPU too; `unsupported` is what keeps others from it."""
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(sdpa.flash.causal_attention(q, k, v), expected)
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).reshape(1, 9, 96)
    y = sdpa.flash.packed_causal_attention(packed, 2)
    torch.testing.assert_close(y, expected.transpose(1, 2).reshape(1, 9, 32))
    assert "needs CUDA" in str(sdpa.cudnn.unsupported((q, k, v), 16, 0.0))
