"""Prompt lookup: the tokens of a step for each, however they are chosen, in fewer steps."""

import random

import pytest
import torch

from fastgpt import sampling, use_backend
from fastgpt.decoding.decoder import Decoder
from fastgpt.decoding.lookup import MOST, PromptLookup, Seen
from tests.close import DEVICE
from tests.decoding.test_decoding import MODES, assert_close, tiny, whole
from tests.decoding.test_sampling import BLOCK_SIZE, V, cached, prompt  # noqa: F401


def repetitive(model):
    """Text that `model` goes on with by itself: it soon repeats what it wrote."""
    start = prompt(1, random.randint(1, 3))
    return model.generate(start, random.randint(1, BLOCK_SIZE), temperature=0)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_without(mode):
    """Drawn models, texts and ways to choose; past block_size too. In C the logits are the same
    bits, so no tie can fall otherwise; PyTorch's are the same to rounding."""
    random.seed(0)
    counts = PromptLookup(1)
    with use_backend(mode):
        for seed in range(16):
            sizes = {"n_layer": random.randint(0, 2), "n_head": random.choice([1, 2, 4])}
            model = tiny(block_size=random.choice([BLOCK_SIZE, 40]), **sizes)
            idx, steps = repetitive(model), random.randint(1, 30)
            how = random.choice([{"temperature": 0}, {"top_k": 2}, {"temperature": 0.3}])
            lookup = PromptLookup(random.randint(1, MOST))
            torch.manual_seed(seed)
            expected, state = model.generate(idx, steps, **how), torch.get_rng_state()
            torch.manual_seed(seed)
            found = model.generate(idx, steps, prompt_lookup=lookup, **how)
            assert torch.equal(found, expected) and torch.equal(torch.get_rng_state(), state)
            counts.guessed += lookup.guessed
            counts.right += lookup.right
    assert 50 < counts.right < counts.guessed - 50


@pytest.mark.skipif("auto" not in MODES, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_logits_in_c_are_the_same_bits(dtype):
    model, text = tiny(block_size=40), prompt(1, 5).repeat(1, 7)
    lookup = PromptLookup(4)
    plain, ahead = (sampling.NextLogits(model, [0], 36, dtype, given) for given in (None, lookup))
    with torch.no_grad():
        for T in range(3, 36):
            assert torch.equal(ahead(text[:, :T]), plain(text[:, :T])), T
    assert lookup.right >= 20


@torch.no_grad()
def test_of_the_kernels():
    model, text = tiny(n_layer=1).to(DEVICE), prompt(1, 3).repeat(1, 3).to(DEVICE)
    lookup = PromptLookup(2)
    with use_backend("triton"):
        logits = sampling.NextLogits(model, [0], 9, None, lookup)
        for T in range(5, 9):
            assert_close(logits(text[:, :T]), whole(model, text[:, :T]))
    assert lookup.right == 2


def test_fewer_steps(monkeypatch):
    """A text that repeats itself costs a step for every `tokens` + 1 of its tokens."""
    widths, step = [], Decoder.step

    def noted(self, ids):
        widths.append(len(ids))
        return step(self, ids)

    monkeypatch.setattr(Decoder, "step", noted)
    model, lookup = tiny(block_size=64), PromptLookup(3)
    with torch.no_grad():
        model.transformer.wte.weight[0] *= 30  # the likeliest token whatever came before
    tokens = model.generate(prompt(1, 4), 40, temperature=0, prompt_lookup=lookup)
    assert len(set(tokens[0, 5:].tolist())) == 1
    assert 10 <= len(widths) <= 13 and max(widths) == 4
    assert lookup.right == 39 - len(widths)  # the prompt gave the first token


def test_a_model_changed_while_guesses_wait():
    """Their logits are of the old weights."""
    for change in ("weights", "hook"):
        model = tiny(block_size=40)
        text = prompt(1, 4).repeat(1, 4)
        stream = model.generate_stream(text, 9, temperature=0, prompt_lookup=3)
        text = torch.cat([text, *(next(stream) for _ in range(3))], dim=1)
        if change == "hook":
            model.transformer.h[0].register_forward_hook(lambda m, x, y: y.flip(-1))
        else:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.7 * torch.randn_like(p))
        expected = model.generate(text, 6, temperature=0)
        assert torch.equal(torch.cat([text, *stream], dim=1), expected)


def test_guesses_are_what_followed_the_last_ids():
    assert Seen([1, 2, 3]).guess(4) == []
    assert Seen([1, 2, 3, 4, 1, 2]).guess(3) == [3, 4, 1]
    assert Seen([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).guess(2) == [9, 2]  # three ids before two
    assert Seen([1, 2, 3, 9, 2, 3, 8, 5, 2, 3]).guess(2) == [8, 5]  # the latest of two
    assert Seen([5, 5, 5]).guess(4) == [5, 5, 5, 5]  # beyond the end it goes on


@pytest.mark.parametrize("tokens", [0, -1, MOST + 1, 2.5])
def test_counts_that_are_none(tokens):
    with pytest.raises(ValueError, match=f"prompt_lookup={tokens} must be from 1 to {MOST}"):
        tiny().generate(prompt(1), 3, prompt_lookup=tokens)


def test_batches_are_refused():
    with pytest.raises(ValueError, match="prompt_lookup=2 is for a single prompt, and there are 3"):
        tiny().generate_stream(prompt(3), 3, prompt_lookup=2)
