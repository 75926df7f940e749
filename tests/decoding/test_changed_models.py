"""A model changed between two columns of a stream, or two calls: what follows is of what it is."""

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastgpt import GPT, TrainStep, sampling
from fastgpt.decoding import draws
from tests.decoding.test_decoding import assert_close, mode, tiny, whole
from tests.decoding.test_sampling import prompt

__all__ = ["mode"]  # a fixture


@torch.no_grad()
def in_place(model: GPT) -> None:
    for p in model.parameters():
        p.add_(0.7 * torch.randn_like(p))


def by_nanogpts_optimizer(model: GPT) -> None:
    """Whose fused update is no change that PyTorch counts."""
    model(prompt(1, 3), prompt(1, 3))[1].backward()
    model.configure_optimizers(0.1, 0.5, (0.9, 0.95), "cpu").step()


def by_pytorchs_optimizer(model: GPT) -> None:
    model(prompt(1, 3), prompt(1, 3))[1].backward()
    torch.optim.AdamW(model.parameters(), lr=0.5, fused=True).step()


def by_a_train_step(model: GPT) -> None:
    TrainStep(model, 0.1, 0.5, (0.9, 0.95))([(prompt(1, 3), prompt(1, 3))])


def to_other_heads(model: GPT) -> None:
    model.config.n_head = 1
    for block in model.transformer.h:
        block.attn.n_head = 1


def to_another_gelu(model: GPT) -> None:
    model.config.gelu = "tanh"
    for block in model.transformer.h:
        block.mlp.gelu.approximate = "tanh"


CHANGES = [
    in_place,
    by_nanogpts_optimizer,
    by_pytorchs_optimizer,
    by_a_train_step,
    to_other_heads,
    to_another_gelu,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_changed_between_two_columns(change, mode, monkeypatch):
    """Keys and values of the model before are of no use after. The logits, as two models may well
    have the same token.
    """
    model, idx, drawn = tiny(), prompt(1, 3), []

    def draw(self, logits):
        drawn.append(logits.clone())
        return logits.argmax(-1, keepdim=True)

    monkeypatch.setattr(draws.Sampling, "draw", draw)
    stream = model.generate_stream(idx, 6, temperature=0)
    text = torch.cat([idx, next(stream), next(stream)], dim=1)
    change(model)
    next(stream)
    assert_close(drawn[-1], whole(model, text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_to_while_copies_are_read(dtype):
    model, idx = tiny(), prompt(1, 3)
    stream = model.generate_stream(idx, 6, temperature=0, dtype=dtype)
    text = torch.cat([idx, next(stream), next(stream)], dim=1)
    in_place(model)
    new = next(stream)
    expected = model.generate(text, 1, temperature=0, dtype=dtype)[:, -1:]
    assert torch.equal(new, expected)


def test_in_a_hook_of_an_optimizers_step():
    """As training samples: no other hook can be added there."""
    model, idx = tiny(), prompt(1, 3)
    expected = model.generate(idx, 5, temperature=0)
    optimizer, found = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), []
    stream = model.generate_stream(idx, 5, temperature=0)
    hook = register_optimizer_step_post_hook(
        lambda *_: found.extend([model.generate(idx, 5, temperature=0), next(stream)])
    )
    optimizer.step()
    hook.remove()
    assert torch.equal(found[0], expected)
    assert torch.equal(torch.cat([idx, found[1], *stream], dim=1), expected)


def test_a_decoder_that_waits_is_of_its_model(monkeypatch):
    monkeypatch.setattr(sampling, "keeps", lambda device: True)
    model, idx = tiny(block_size=40), prompt(1, 4)
    in_place(model)  # so that heads decide on tokens
    model.generate(idx, 12, temperature=0)
    to_other_heads(model)
    expected = copy.deepcopy(model).generate(idx, 12, temperature=0)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)
