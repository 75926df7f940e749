"""Weights and optimizer state go from nanoGPT and Hugging Face to us and back, wrapped or not."""

import copy
import importlib.util
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, weights

SIZES: dict[str, Any] = {"block_size": 8, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 16}


def tiny(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SIZES, **changes}))


def cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state.items()}


def assert_same_weights(model: GPT, state: dict[str, Tensor]) -> None:
    ours = model.state_dict()
    assert list(ours) == list(state)
    assert all(torch.equal(ours[name], t) for name, t in state.items())
    assert model.lm_head.weight is model.transformer.wte.weight


def in_block_0(name: str) -> str:
    return name.replace("transformer.h.0.", "transformer.h.0._orig_mod.")


WRAPPED: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "torch.compile in DDP": lambda name: f"module._orig_mod.{name}",
    "DDP in torch.compile": lambda name: f"_orig_mod.module.{name}",
    "one block compiled": in_block_0,
    "one block compiled, in DDP": lambda name: f"module.{in_block_0(name)}",
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_loads_whatever_wrapped_the_saved_model(wrapped):
    state = cloned(tiny(seed=1).state_dict())
    given = {WRAPPED[wrapped](name): t for name, t in state.items()}
    before = dict(given)
    model = tiny()
    model.load_state_dict(given)
    assert_same_weights(model, state)
    assert list(given) == list(before) and all(given[name] is before[name] for name in before)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_loads_into_a_model_with_compiled_blocks(wrapped):
    state = cloned(tiny(seed=1).state_dict())
    model = tiny()
    model.transformer.h[0] = torch.compile(model.transformer.h[0])  # compiles when called
    model.load_state_dict({WRAPPED[wrapped](name): t for name, t in state.items()})
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name.replace("_orig_mod.", "")])


def test_attention_masks_of_older_versions_are_no_weights():
    state = cloned(tiny(seed=1).state_dict())
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    model = tiny()
    model.load_state_dict({**state, **masks})
    assert_same_weights(model, state)


BROKEN: dict[str, tuple[Callable[[dict], Any], str]] = {
    "missing": (lambda state: state.pop("transformer.ln_f.weight"), "Missing key.*ln_f.weight"),
    "unexpected": (lambda state: state.update(extra=torch.ones(1)), "Unexpected key.*extra"),
    "shape": (
        lambda state: state.update({"transformer.wpe.weight": torch.ones(9, 16)}),
        "size mismatch for transformer.wpe.weight",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_strict_loading_refuses(what):
    break_it, message = BROKEN[what]
    state = tiny().state_dict()
    break_it(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        tiny().load_state_dict(state)


def test_a_checkpoint_as_train_py_writes_it(tmp_path):
    """nanoGPT's model_args, without our fields; loadable without running pickled code."""
    model = tiny(seed=1)
    model_args = {**SIZES, "dropout": 0.0, "bias": True}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    saved = {"model": model.state_dict(), "model_args": model_args, "iter_num": 3}
    torch.save({**saved, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    loaded = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    other = GPT(GPTConfig(**loaded["model_args"]))
    other.load_state_dict(loaded["model"])
    assert_same_weights(other, model.state_dict())


def test_a_deep_copy_is_tied_and_loads_on_its_own():
    model = tiny(seed=1)
    state, other = cloned(model.state_dict()), copy.deepcopy(model)
    other.load_state_dict({f"_orig_mod.{name}": torch.zeros_like(t) for name, t in state.items()})
    assert_same_weights(model, state)
    assert_same_weights(other, {name: torch.zeros_like(t) for name, t in state.items()})


def test_models_and_configs_pickle():
    config = GPTConfig(**SIZES, residual_init="0.02")
    assert pickle.loads(pickle.dumps(config)) == config
    model = tiny(seed=1)
    assert_same_weights(pickle.loads(pickle.dumps(model)), model.state_dict())


@pytest.fixture
def nanogpt():
    """The real nanoGPT's model module, from a checkout named by NANOGPT_DIR."""
    if "NANOGPT_DIR" not in os.environ:
        pytest.skip("set NANOGPT_DIR to a checkout of karpathy/nanoGPT to run against the real one")
    path = Path(os.environ["NANOGPT_DIR"]) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(model, optimizer, rows: Tensor) -> list[float]:
    losses = []
    for row in rows:
        _, loss = model(row[None, :-1], row[None, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("direction", ["from nanoGPT", "to nanoGPT"])
def test_training_continues_in_the_other_implementation(direction, bias, nanogpt):
    sizes = {**SIZES, "bias": bias}
    theirs, ours = nanogpt.GPT(nanogpt.GPTConfig(**sizes)), tiny(seed=1, bias=bias)
    first, second = (theirs, ours) if direction == "from nanoGPT" else (ours, theirs)
    recipe = (0.1, 1e-2, (0.9, 0.95), "cpu")
    rows = torch.randint(SIZES["vocab_size"], (8, SIZES["block_size"] + 1))

    optimizer = first.configure_optimizers(*recipe)
    train(first, optimizer, rows[:4])
    second.load_state_dict(first.state_dict())
    other = second.configure_optimizers(*recipe)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares the tensors

    expected = train(first, optimizer, rows[4:])
    assert train(second, other, rows[4:]) == pytest.approx(expected, rel=1e-6)  # 8 eps


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


def hugging_face_model(transformers, activation: str = "gelu_new"):
    """A GPT2LMHeadModel of random weights; "gelu_new" is the tanh GELU, "gelu" the exact one."""
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"],
        n_positions=SIZES["block_size"],
        n_embd=SIZES["n_embd"],
        n_layer=SIZES["n_layer"],
        n_head=SIZES["n_head"],
        activation_function=activation,
        initializer_range=0.2,  # wide enough to tell the two GELUs apart
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("activation, gelu", [("gelu_new", "tanh"), ("gelu", "none")])
def test_hugging_face_weights_give_its_logits(activation, gelu, transformers):
    theirs, ours = hugging_face_model(transformers, activation), tiny(gelu=gelu).eval()
    weights.load_hugging_face(ours, theirs.state_dict())
    idx = torch.randint(SIZES["vocab_size"], (2, SIZES["block_size"]))
    logits, _ = ours(idx, idx)
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-5, atol=1e-5)
    ours.transformer.h[0].mlp.gelu.approximate = "none" if gelu == "tanh" else "tanh"
    assert not torch.allclose(ours(idx, idx)[0], logits, rtol=1e-5, atol=1e-5)


def test_to_hugging_face_and_back(transformers):
    model, theirs = tiny(seed=1), hugging_face_model(transformers)
    theirs.load_state_dict(weights.to_hugging_face(model))
    other = tiny()
    weights.load_hugging_face(other, theirs.state_dict())
    assert_same_weights(other, model.state_dict())


def test_hugging_face_weights_of_another_model_are_refused(transformers):
    state = hugging_face_model(transformers).state_dict()
    with pytest.raises(ValueError, match=r"parameter names differ: .*h\.1"):
        weights.load_hugging_face(tiny(n_layer=1), state)
    with pytest.raises(ValueError, match=r"wpe.weight is \(8, 16\) in the source and \(4, 16\)"):
        weights.load_hugging_face(tiny(block_size=4), state)


@pytest.fixture
def hub(monkeypatch, transformers):
    """GPT-2 as the hub would give it, but two layers of width 16."""
    sizes = {name: SIZES[name] for name in ("n_layer", "n_head", "n_embd")}
    monkeypatch.setitem(weights.SIZES, "gpt2", sizes)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return gpt2

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", from_pretrained)
    yield gpt2
    assert asked == ["gpt2"]


def test_from_pretrained(hub):
    model = GPT.from_pretrained("gpt2")
    config = model.config
    assert (config.vocab_size, config.block_size, config.bias) == (50257, 1024, True)
    assert (config.dropout, config.gelu) == (0.0, "none")  # as in nanoGPT
    for name, t in weights.to_hugging_face(model).items():
        assert torch.equal(t, hub.state_dict()[name]), name


def test_from_pretrained_with_overrides(hub):
    model = GPT.from_pretrained("gpt2", {"dropout": 0.1, "gelu": "tanh"})
    assert model.transformer.drop.p == model.transformer.h[0].attn.dropout == 0.1
    assert model.transformer.h[0].mlp.gelu.approximate == "tanh"


WRONG: dict[str, tuple[tuple, str]] = {
    "model": (("gpt3",), "model_type='gpt3'.*gpt2-xl"),
    "override": (("gpt2", {"n_layer": 3, "dropout": 0.1}), "cannot override n_layer.*dropout"),
}


@pytest.mark.parametrize("what", WRONG)
def test_from_pretrained_refuses(what):
    arguments, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(*arguments)
