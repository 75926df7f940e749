"""Sampling: with the key-value cache the tokens are those of a loop that recomputes everything.

`plain_sample` is that loop, as nanoGPT has it. Both must agree in the tokens and in what they leave
of the random generator, past block_size too, and in a model that someone hooked or changed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, sampling
from fastgpt.decoding import draws
from fastgpt.decoding.decoder import Decoder
from fastgpt.decoding.draws import Sampling

V, BLOCK_SIZE = 31, 12


def tiny(kind: type[GPT] = GPT, **changes) -> GPT:
    sizes = {"block_size": BLOCK_SIZE, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = kind(GPTConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("transformer.ln_f"):  # or one token would always win
                p.add_(0.5 * torch.randn_like(p))
    return model


@torch.no_grad()
def plain_sample(model: GPT, idx: Tensor, steps: int, temperature=1.0, top_k=None) -> Tensor:
    for _ in range(steps):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1] / temperature
        if top_k is not None:
            worst_kept = logits.topk(top_k).values[:, -1:]
            logits = torch.where(logits < worst_kept, -math.inf, logits)
        idx = torch.cat([idx, F.softmax(logits, -1).multinomial(1)], dim=1)
    return idx


def prompt(rows: int = 2, length: int = 4) -> Tensor:
    return torch.randint(V, (rows, length))


def assert_samples_alike(model: GPT, idx: Tensor, steps: int, **how) -> None:
    torch.manual_seed(1)
    expected, state = plain_sample(model, idx, steps, **how), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, steps, **how), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def cached(monkeypatch) -> list[int]:
    """The number of columns that each cached step computed; empty if none was."""
    widths: list[int] = []
    prefill, step = Decoder.prefill, Decoder.step

    def recorded_prefill(self, idx, lengths=None):
        widths.append(idx.size(1))
        return prefill(self, idx, lengths)

    def recorded_step(self, ids):
        widths.append(1)
        return step(self, ids)

    monkeypatch.setattr(Decoder, "prefill", recorded_prefill)
    monkeypatch.setattr(Decoder, "step", recorded_step)
    return widths


SAMPLING: dict[str, dict] = {
    "plain": {},
    "greedy": {"top_k": 1},
    "cold, top 5": {"temperature": 0.7, "top_k": 5},
    "hot": {"temperature": 1.7},
    "all of the vocabulary": {"top_k": V},
}


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("rows, length", [(1, 1), (3, 4), (2, BLOCK_SIZE), (2, BLOCK_SIZE + 5)])
def test_tokens_are_those_of_the_plain_loop(rows, length, how):
    assert_samples_alike(tiny(), prompt(rows, length), BLOCK_SIZE + 6, **SAMPLING[how])


@pytest.mark.parametrize("config", [{"bias": False}, {"gelu": "tanh"}, {"n_head": 1}], ids=str)
def test_tokens_of_other_models(config):
    assert_samples_alike(tiny(**config), prompt(), BLOCK_SIZE + 6)


def test_the_cache_computes_one_column_a_token_until_the_window_moves(cached):
    tiny().generate(prompt(length=4), BLOCK_SIZE + 6)
    assert cached == [4] + [1] * (BLOCK_SIZE - 4)


@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_to_rounding():
    model, idx = tiny(), prompt(3, BLOCK_SIZE)
    cached = sampling.NextLogits(model, [0, 0, 0], BLOCK_SIZE)
    for length in range(3, BLOCK_SIZE + 1):
        logits = cached(idx[:, :length])
        torch.testing.assert_close(logits, model(idx[:, :length])[0][:, -1], rtol=1e-5, atol=1e-5)
    assert cached.filled == BLOCK_SIZE


class Louder(GPT):
    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        return 3 * logits, loss


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


def double_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, out: 2 * out)


def patch_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def halve_outputs_of_the_model(model: GPT) -> None:
    model.register_forward_hook(lambda _, args, out: (out[0] / 2, out[1]))


CHANGES = {
    "hook on the model": halve_outputs_of_the_model,
    "hook on a block": lambda model: double_output(model.transformer.h[0]),
    "hook on attn": lambda model: double_output(model.transformer.h[0].attn),
    "hook on c_attn": lambda model: double_output(model.transformer.h[0].attn.c_attn),
    "hook on c_fc": lambda model: double_output(model.transformer.h[0].mlp.c_fc),
    "hook on drop": lambda model: double_output(model.transformer.drop),
    "hook on resid_dropout": lambda model: double_output(model.transformer.h[0].attn.resid_dropout),
    "another drop": lambda model: setattr(model.transformer, "drop", Tripled()),
    "block.forward patched": lambda model: patch_forward(model.transformer.h[0]),
    "attn.forward patched": lambda model: patch_forward(model.transformer.h[0].attn),
    "gelu = ReLU": lambda model: setattr(model.transformer.h[0].mlp, "gelu", nn.ReLU()),
    "n_head": lambda model: setattr(model.transformer.h[0].attn, "n_head", 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_samples_as_it_computes(change):
    model, idx = tiny(), prompt()
    before = model(idx)[0]
    CHANGES[change](model)
    assert not torch.allclose(model(idx)[0], before, rtol=1e-3)
    assert_samples_alike(model, idx, 20)


def test_a_subclass_samples_from_its_own_forward(cached):
    assert_samples_alike(tiny(Louder), prompt(), 20)
    assert cached == []


def test_a_hook_sees_every_step(cached):
    model, shapes = tiny(), []
    model.transformer.h[0].register_forward_hook(lambda _, args, out: shapes.append(out.shape[1]))
    model.generate(prompt(length=4), 3)
    assert shapes == [4, 5, 6] and cached == []


TRAINING = {
    "the model": lambda model: model.train(),
    "one module": lambda model: model.transformer.drop.train(),
}


@pytest.mark.parametrize("what", TRAINING)
def test_dropout_while_sampling_draws_as_the_plain_loop(what, cached):
    """A cached step would draw its masks for one position only."""
    model = tiny(dropout=0.2)
    TRAINING[what](model)
    assert_samples_alike(model, prompt(), 10)
    assert cached == []


def test_training_mode_without_dropout_keeps_the_cache(cached):
    tiny().train().generate(prompt(length=4), 3)
    assert cached == [4, 1, 1]


def drawn(logits: list[float], count: int = 4000, **how) -> dict[int, float]:
    """How often each id was drawn from the same logits."""
    ids = draws.Sampling(**how).draw(torch.tensor([logits]).repeat(count, 1))
    assert ids.shape == (count, 1)
    return {i: n / count for i, n in enumerate(ids.flatten().bincount().tolist()) if n}


def test_top_k_keeps_ties_with_the_kth():
    assert drawn([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2).keys() == {1, 2, 3}
    assert drawn([1.0, 2.0], top_k=9).keys() == {0, 1}  # more than there are


HALVING = [math.log(p) for p in (0.05, 0.5, 0.15, 0.3)]


@pytest.mark.parametrize("top_p, kept", [(0.4, {1}), (0.6, {1, 3}), (0.9, {1, 2, 3}), (1.0, None)])
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    assert drawn(HALVING, top_p=top_p).keys() == (kept or {0, 1, 2, 3})


def test_top_p_keeps_the_ratios_of_what_stays():
    often = drawn(HALVING, top_p=0.6)
    sigma = math.sqrt(5 / 8 * 3 / 8 / 4000)  # of a frequency over 4000 draws
    assert often[1] == pytest.approx(5 / 8, abs=5 * sigma)


def test_temperature_0_is_argmax_and_draws_nothing():
    model, idx = tiny(), prompt()
    state = torch.get_rng_state()
    tokens = model.generate(idx, 20, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, plain_sample(model, idx, 20, top_k=1))


def test_a_stop_token_fills_its_row_and_ends_the_batch():
    model, idx = tiny(), prompt(rows=3)
    free = model.generate(idx, 20, temperature=0)
    stop = int(free[0, 7])
    tokens = model.generate(idx, 20, temperature=0, stop_token=stop)
    ends = []
    for row, free_row in zip(tokens[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = free_row.index(stop) if stop in free_row else len(row)
        assert row[:end] == free_row[:end] and set(row[end:]) <= {stop}
        ends.append(end)
    assert len(set(ends)) > 1  # rows that stop apart, or filling up went untested
    assert tokens.size(1) - 4 == min(20, max(ends) + 1)


def test_streaming_yields_the_same_columns():
    model, idx = tiny(), prompt()
    torch.manual_seed(1)
    tokens = model.generate(idx, 20, top_k=5)
    torch.manual_seed(1)
    columns = list(model.generate_stream(idx, 20, top_k=5))
    assert all(column.shape == (2, 1) for column in columns)
    assert torch.equal(torch.cat([idx, *columns], dim=1), tokens)


def test_streaming_computes_a_column_when_asked_for_it(cached):
    stream = tiny().generate_stream(prompt(length=4), 20)
    assert cached == []
    next(stream)
    assert cached == [4] and torch.is_grad_enabled()  # no_grad ends where the caller goes on
    next(stream)
    assert cached == [4, 1]


def test_a_model_changed_between_two_columns(cached):
    """From then on it runs as a whole, and changed back it fills a new cache."""
    model, idx = tiny(), prompt(length=4)
    stream = model.generate_stream(idx, 6, temperature=0)
    next(stream), next(stream)
    hook = model.transformer.h[0].register_forward_hook(lambda m, x, y: y.flip(-1))
    changed = next(stream)
    hook.remove()
    assert cached == [4, 1] and len(list(stream)) == 3 and cached == [4, 1, 7, 1, 1]
    tokens = model.generate(idx, 2, temperature=0)
    model.transformer.h[0].register_forward_hook(lambda m, x, y: y.flip(-1))
    assert torch.equal(changed, model(tokens)[0][:, -1].argmax(-1, keepdim=True))


def test_no_new_tokens_are_the_prompt():
    idx = prompt()
    assert torch.equal(tiny().generate(idx, 0), idx)


INVALID: dict[str, list] = {
    "temperature": [-1.0, math.nan],
    "top_k": [0, -3],
    "top_p": [0.0, -0.5, 1.5, math.nan],
}


@pytest.mark.parametrize("name, value", [(n, value) for n in INVALID for value in INVALID[n]])
def test_invalid_settings_are_refused_before_any_token(name, value):
    model = tiny()
    with pytest.raises(ValueError, match=f"{name}={value}.*(use None|0 .argmax. or positive)"):
        model.generate_stream(prompt(), 1, **{name: value})


def three_draws(how: Sampling, logits: Tensor) -> list[Tensor]:
    """Three draws, and what is left of the generator."""
    torch.manual_seed(3)
    torch.randn(1)  # the generator keeps a number for the next call
    return [how.draw(logits) for _ in range(3)] + [torch.get_rng_state()]


@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"top_k": 20}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (1, 50257)], ids=str)
def test_a_draw_is_that_of_multinomial(shape, how, monkeypatch):
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = three_draws(Sampling(**how), logits)
    monkeypatch.setattr(draws, "_may_race", lambda p: False)
    assert all(map(torch.equal, found, three_draws(Sampling(**how), logits)))


def test_where_exponentials_are_known_they_are_made():
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    e = torch.empty(97).exponential_(generator=one)
    u = torch.empty(97, dtype=torch.float64).uniform_(generator=other)
    if not torch.equal(e, -torch.log1p(-u).float()):
        pytest.skip("this PyTorch makes exponential numbers in another way")
    assert draws._multinomial_races()


def test_what_is_left_to_multinomial(monkeypatch):
    """Probabilities that it refuses, here of logits beyond fp32's range, and dtypes nobody has
    compared.
    """
    monkeypatch.setattr(draws, "_race", None)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        Sampling(temperature=1e-40).draw(torch.ones(1, 5))
    assert 0 <= Sampling().draw(torch.zeros(1, 5).double()) < 5


def test_a_pytorch_that_draws_otherwise(monkeypatch):
    monkeypatch.setattr(draws, "_multinomial", lambda p, n, generator: p.argmin(-1, True))
    draws._multinomial_races.cache_clear()
    try:
        assert not draws._multinomial_races()
    finally:
        draws._multinomial_races.cache_clear()
