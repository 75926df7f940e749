"""Draws that are part of a step's graph: the tokens, and what is left of the generator, are those
of draws after it.

On a CPU with a stand-in for CUDA's graphs: a capture does nothing, and a replay does it all.
"""

import gc

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, checks, sampling
from fastgpt.decoding import decoder, draws, pool
from fastgpt.decoding.decoder import KEPT, PATIENCE, Decoder
from tests.close import DEVICE
from tests.decoding.test_decoding import tiny
from tests.decoding.test_sampling import prompt

LONG = 70  # block_size: two buckets, of 64 and of all
HOW: dict[str, dict] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "all": {"temperature": 0.9, "top_k": 9, "top_p": 0.9},
}


class Steps:
    """What the decoders did: the calls of step_and_draw with ids and without, and captures."""

    def __init__(self):
        self.given: list[bool] = []
        self.captures = 0


@pytest.fixture
def steps(monkeypatch) -> Steps:
    seen, step_and_draw = Steps(), Decoder.step_and_draw

    class Graph:
        def __init__(self, run):
            self.replay = run
            seen.captures += 1

    def noted(self, drawing, ids=None):
        seen.given.append(ids is not None)
        return step_and_draw(self, drawing, ids)

    monkeypatch.setattr(sampling, "notes_pytorch", lambda device: True)
    monkeypatch.setattr(decoder, "capture_for", lambda device, run: Graph)
    monkeypatch.setattr(decoder, "PATIENCE", 3)
    monkeypatch.setattr(Decoder, "step_and_draw", noted)
    return seen


def seeded(call) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return call(), torch.get_rng_state()


def assert_same(call, monkeypatch) -> None:
    """As with draws after the steps, and nothing captured."""
    found = seeded(call)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "capture_for", lambda device, run: None)
        patch.setattr(sampling, "notes_pytorch", lambda device: False)
        expected = seeded(call)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("how", HOW)
def test_tokens_and_generator(how, rows, steps, monkeypatch):
    """In both buckets, six tokens in each, and past block_size."""
    model, idx = tiny(block_size=LONG), prompt(rows, 58)
    assert_same(lambda: model.generate(idx, 16, **HOW[how]), monkeypatch)
    # the first token is of the prompt; the last three are past block_size
    assert steps.given == [True] + [False] * (LONG - 58 - 1)
    assert steps.captures == 2 * 2  # of two buckets, without a draw and with one


def test_prompts_of_unequal_length(steps, monkeypatch):
    """While all are within block_size; a row past it is computed as a whole."""
    model, idx, lengths = tiny(block_size=20), prompt(3, 12), torch.tensor([12, 3, 7])
    assert_same(lambda: model.generate(idx, 25, top_k=5, lengths=lengths), monkeypatch)
    assert steps.given == [True] + [False] * 7


def test_a_stop_token(steps, monkeypatch):
    model, idx = tiny(block_size=40), prompt(3, 4)
    free = seeded(lambda: model.generate(idx, 30))[0][:, 4:]
    stop = int(free[0, 9])
    found = seeded(lambda: model.generate(idx, 30, stop_token=stop))[0][:, 4:].tolist()
    ends = [row.index(stop) if stop in row else len(row) for row in found]
    assert min(ends) < 10 and len(set(ends)) > 1  # rows that go on beside one that stopped
    assert_same(lambda: model.generate(idx, 45, stop_token=stop), monkeypatch)


def streamed(model: GPT, idx: Tensor, count: int, change=lambda: None, **how) -> Tensor:
    """The columns of a stream, between two of which there is a change."""
    columns = []
    for i, column in enumerate(model.generate_stream(idx, count, **how)):
        columns.append(column)
        if i == 9:
            change()
    return torch.cat(columns, dim=1)


def test_a_model_changed_between_two_columns(steps, monkeypatch):
    model, idx = tiny(block_size=40), prompt(2, 4)
    state = {name: t.clone() for name, t in model.state_dict().items()}

    def in_turn() -> Tensor:
        model.load_state_dict(state)

        def write():
            with torch.no_grad():
                model.transformer.wpe.weight.mul_(-1)

        written = streamed(model, idx, 20, write)
        hook = []

        def watch():
            hook.append(model.transformer.h[0].register_forward_hook(lambda m, x, y: y.flip(-1)))

        hooked = streamed(model, idx, 20, watch)
        hook[0].remove()
        return torch.cat([written, hooked])

    assert_same(in_turn, monkeypatch)
    # a new cache, whose first token is of its prefill; and no cache any more
    assert steps.given == [True] + [False] * 8 + [True] + [False] * 8 + [True] + [False] * 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["greedy", "plain"])
def test_logits_that_are_not_finite(how, bad, steps, monkeypatch):
    """Where no draw can look, as on a GPU: in the graph, before it and past block_size."""
    monkeypatch.setattr(checks, "can_be_read", lambda idx: False)
    monkeypatch.setattr(torch, "multinomial", draws._multinomial)
    monkeypatch.setattr(draws, "_may_race", lambda p: True)
    for count in (1, 2, 30, 60):
        model, idx = tiny(block_size=40), prompt(2, 4)
        assert len(list(model.generate_stream(idx, count, **HOW[how]))) == count
        with torch.no_grad():
            model.lm_head.weight[3] = bad
        with pytest.raises(RuntimeError, match="the logits hold NaN or inf"):
            model.generate(idx, count, **HOW[how])
    columns = model.generate_stream(idx, 200, **HOW[how])
    with pytest.raises(RuntimeError, match="the logits hold NaN or inf"):
        for count, _ in enumerate(columns):
            assert count < sampling.CHECKED_EVERY


@pytest.mark.parametrize("count", [20, 45], ids=["in the graph", "and past block_size"])
def test_logits_that_are_not_finite_once(count, steps, monkeypatch):
    """Written in a way that nobody sees, so that the graph goes on; and taken back."""
    monkeypatch.setattr(checks, "can_be_read", lambda idx: False)
    model, idx = tiny(block_size=40), prompt(1, 4)
    weight = model.lm_head.weight.data
    before, columns = weight[3].clone(), model.generate_stream(idx, count, temperature=0)
    for _ in range(10):
        next(columns)
    captures = steps.captures
    weight[3] = float("nan")
    next(columns)
    weight[3] = before
    with pytest.raises(RuntimeError, match="the logits hold NaN or inf"):
        list(columns)
    assert steps.captures == captures > 0


def test_a_decoder_that_met_nan_goes_on_with_other_weights(steps, monkeypatch):
    monkeypatch.setattr(sampling, "keeps", lambda device: True)
    model, idx = tiny(block_size=40), prompt(2, 4)
    expected = model.generate(idx, 12, temperature=0)
    (waiting,) = (entry[1] for entry in pool._waiting.values())
    waiting.zero.fill_(float("nan"))
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)


def test_two_streams_interleaved(steps, monkeypatch):
    model, idx = tiny(block_size=40), prompt(2, 4)

    def both() -> Tensor:
        streams = [model.generate_stream(idx, 20, **how) for how in ({"top_k": 4}, {"top_p": 0.7})]
        return torch.cat([c for pair in zip(*streams, strict=True) for c in pair], dim=1)

    assert_same(both, monkeypatch)
    assert steps.given.count(True) == 2


def test_columns_are_the_callers(steps):
    model, idx = tiny(block_size=40), prompt(2, 4)
    expected = seeded(lambda: model.generate(idx, 20))[0]
    torch.manual_seed(1)
    assert torch.equal(torch.cat([idx, *model.generate_stream(idx, 20)], dim=1), expected)
    torch.manual_seed(1)
    copies = []
    for column in model.generate_stream(idx, 20):
        copies.append(column.clone())
        column.zero_()
    assert torch.equal(torch.cat([idx, *copies], dim=1), expected)


def test_settings_that_change_between_calls(steps, monkeypatch):
    """A decoder that is kept has the graphs of the latest few settings only."""
    model, idx = tiny(block_size=40), prompt(2, 4)
    monkeypatch.setattr(sampling, "keeps", lambda device: True)
    for temperature in (0.5, 0.6, 0.7, 0.8, 0.9, 0.7, 1.0, 1, 0.5):
        assert_same(lambda t=temperature: model.generate(idx, 12, temperature=t), monkeypatch)
    _, kept = pool._waiting[model]
    assert [d.temperature for d in kept.drawing] == [0.9, 0.7, 1.0, 0.5] and KEPT == 4
    assert steps.captures == 1 + 7  # the second 0.5 is one that was dropped


def test_a_short_generation_captures_no_draw(steps):
    model = tiny(block_size=40)
    model.generate(prompt(2, 4), 1 + 3)
    assert steps.captures == 1 and len(steps.given) == 3
    model.generate(prompt(2, 4), 1 + 4)
    assert steps.captures == 3


def test_memory_is_constant(steps, monkeypatch):
    model, idx = tiny(block_size=40), prompt(2, 4)
    monkeypatch.setattr(sampling, "keeps", lambda device: True)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    model.generate(idx, 12)
    before = tensors()
    for i in range(10):
        model.generate(idx, 12, temperature=1 + i)
        next(model.generate_stream(idx, 12))
    assert tensors() == before


ASIDE: dict[str, dict] = {
    "a tensor of temperatures": {"temperature": torch.tensor([[0.5], [1.5]])},
    "a tensor that is one number": {"top_p": torch.tensor(0.5)},
    "guesses": {"prompt_lookup": 2},
}


@pytest.mark.parametrize("case", ASIDE)
def test_other_draws_are_made_after_the_step(case, steps):
    rows = 1 if case == "guesses" else 2
    tiny(block_size=40).generate(prompt(rows, 4), 12, **ASIDE[case])
    assert steps.given == []


def test_a_multinomial_of_the_callers_is_called(steps, monkeypatch):
    """From the token on before which it was put there, and until it is taken away."""
    drawn, multinomial = [], torch.multinomial

    def noted(p, num_samples):
        drawn.append(p.shape)
        return multinomial(p, num_samples)

    def columns() -> Tensor:
        stream, found = model.generate_stream(idx, 18), []
        found += [next(stream) for _ in range(6)]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", noted)
            found += [next(stream) for _ in range(6)]
        return torch.cat([*found, *stream], dim=1)

    model, idx = tiny(block_size=40), prompt(2, 4)
    assert_same(columns, monkeypatch)
    assert len(drawn) == 2 * 6
    assert steps.given == [True] + [False] * 4 + [True] + [False] * 5


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("how", HOW)
def test_on_cuda(how, rows, monkeypatch):
    """Captured in inference mode and replayed outside; with another seed, and draws of others, in
    between."""
    sizes = dict(block_size=160, vocab_size=50304, n_layer=2, n_head=4, n_embd=128)
    model = GPT(GPTConfig(**sizes)).to(DEVICE, torch.bfloat16).eval()
    idx = torch.randint(50304, (rows, 5), device=DEVICE)
    captured, forward_and_draw = [], Decoder._forward_and_draw

    def noted(self, *args):
        captured.append(torch.cuda.is_current_stream_capturing())
        forward_and_draw(self, *args)

    def sampled(count: int) -> tuple[Tensor, Tensor]:
        torch.cuda.manual_seed(3)
        columns = []
        for i, column in enumerate(model.generate_stream(idx, count, **HOW[how])):
            columns.append(column)
            if i == 60:
                torch.cuda.manual_seed(4)
            if i == 90:
                torch.rand(7, device=DEVICE)
        return torch.cat(columns, dim=1), torch.cuda.get_rng_state()

    inference = torch.inference_mode
    ways = (inference(), 155), (inference(False), 155), (torch.no_grad(), 165)  # past block_size
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "notes_pytorch", lambda device: False)
        expected = [sampled(count) for _, count in ways]
    monkeypatch.setattr(Decoder, "_forward_and_draw", noted)
    for (around, count), theirs in zip(ways, expected, strict=True):
        with around:
            mine = sampled(count)
        assert all(map(torch.equal, mine, theirs))
    assert sum(captured) == 3 and len(captured) > 3 * PATIENCE  # buckets of 64, 128 and 160


@pytest.mark.skipif(DEVICE != "cuda", reason="where logits and ids cannot be looked at")
@pytest.mark.parametrize("how", ["greedy", "plain"])
def test_errors_on_cuda_leave_the_gpu_usable(how):
    model, idx = tiny(block_size=60).to(DEVICE), prompt(2, 4).to(DEVICE)
    expected = model.generate(idx, 40, temperature=0)
    with pytest.raises(IndexError, match="idx holds ids from"):
        model.generate(torch.full((1, 1), 10**6, device=DEVICE), 3)
    row = model.lm_head.weight.data[3].clone()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(RuntimeError, match="the logits hold NaN or inf"):
        model.generate(idx, 40, **HOW[how])
    model.lm_head.weight.data[3] = row
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)
