"""What a call of generate needs and leaves behind, and what it gives to a fork's own modules."""

import gc
import weakref

import pytest
import torch

from fastgpt import GPT, sampling
from fastgpt.decoding import draws, pool
from tests.decoding.test_sampling import BLOCK_SIZE, assert_samples_alike, prompt, tiny


def test_a_count_that_no_memory_holds():
    """For a stream that is to go on until a token that stops it."""
    stream = tiny().generate_stream(prompt(), 10**18)
    assert [next(stream).shape for _ in range(3)] == 3 * [(prompt().size(0), 1)]


def test_a_text_longer_than_its_room(monkeypatch):
    model, idx = tiny(), prompt(2, 3)
    expected = model.generate(idx, 29, temperature=0)
    monkeypatch.setattr(sampling, "_ROOM", 2)
    assert torch.equal(model.generate(idx, 29, temperature=0), expected)


def test_a_finished_call_leaves_no_memory_to_the_collector(monkeypatch):
    """A decoder holds a cache, and weights in another dtype: copies of a finished call would pile
    up until Python looks for cycles.
    """
    alive = weakref.WeakSet()
    made = sampling.NextLogits._new_decoder

    def noted(*args):
        decoder = made(*args)
        alive.add(decoder)
        return decoder

    monkeypatch.setattr(sampling.NextLogits, "_new_decoder", noted)
    model = tiny()
    gc.collect()
    gc.disable()
    try:
        for count in (3, BLOCK_SIZE + 3):  # and past the window
            model.generate(prompt(2, 3), count)
            assert not alive
        stream = model.generate_stream(prompt(2, 3), 9)
        next(stream), next(stream)
        assert len(alive) == 1
        del stream
        assert not alive
    finally:
        gc.enable()


def test_a_decoder_that_waits_is_free_when_it_is_dropped(monkeypatch):
    monkeypatch.setattr(sampling, "keeps", lambda device: True)
    model = tiny(block_size=40)
    gc.collect()
    gc.disable()
    try:
        for free in (
            lambda: pool.drop(model),
            lambda: model.generate(prompt(3, 3), 4),  # of another number of rows
        ):
            model.generate(prompt(2, 3), 4)
            waiting = weakref.ref(pool._waiting[model][1])
            free()
            assert waiting() is None
    finally:
        gc.enable()


def test_ids_for_a_forks_forward_are_contiguous():
    class Viewing(GPT):
        def forward(self, idx, targets=None):
            assert idx.view(-1).dtype == torch.int64
            return super().forward(idx, targets)

    model = Viewing(tiny().config)
    assert model.generate(prompt(2, 3).int(), 12).shape == (2, 15)


def test_blocks_in_a_container_that_skips_some():
    """LayerDrop: other blocks for each token."""

    class Dropped(torch.nn.ModuleList):
        def __iter__(self):
            return (block for block in super().__iter__() if torch.rand(()) < 0.5)

    model = tiny(n_layer=4)
    model.transformer.h = Dropped(model.transformer.h)
    assert_samples_alike(model, prompt(2, 3), 7)


BAD = [
    (TypeError, "temperature=None must be a number", {"temperature": None}),
    (TypeError, "temperature='1' must be a number", {"temperature": "1"}),
    (TypeError, "temperature=True must be a number", {"temperature": True}),
    (ValueError, "must be positive for every row", {"temperature": torch.tensor([[1.0], [-1.0]])}),
    (ValueError, "must be positive for every row", {"temperature": torch.tensor([[1.0], [0.0]])}),
    (TypeError, "top_k=1.5 must be an integer or None", {"top_k": 1.5}),
    (TypeError, "top_k='5' must be an integer or None", {"top_k": "5"}),
    (TypeError, "top_p='0.5' must be a number or None", {"top_p": "0.5"}),
    (TypeError, "stop_token='a' must be an integer or None", {"stop_token": "a"}),
    (TypeError, "stop_token=1.5 must", {"stop_token": torch.tensor(1.5)}),
    (TypeError, r"stop_token=tensor\(\[3\]\) must", {"stop_token": torch.tensor([3])}),
    (TypeError, "top_k=2.5 must", {"top_k": torch.tensor(2.5)}),
    (TypeError, "stop_token=5.5 must be an integer or None", {"stop_token": 5.5}),
    (ValueError, "stop_token=-1 is never sampled: ids are from 0 to 30", {"stop_token": -1}),
    (ValueError, "stop_token=31 is never sampled: ids are from 0 to 30", {"stop_token": 31}),
    (ValueError, r"lengths=\[True, True\] must be", {"lengths": torch.tensor([True, True])}),
    (ValueError, "lengths=3 must be", {"lengths": 3}),
    (TypeError, "idx must be a tensor of token ids, got list", {"idx": [1, 2]}),
    (IndexError, "has no last position; give at least one token", {"idx": prompt(2, 0)}),
    (ValueError, "max_new_tokens=2.0 must be an integer", {"max_new_tokens": 2.0}),
    (ValueError, "max_new_tokens=None must be an integer", {"max_new_tokens": None}),
]


@pytest.mark.parametrize("error, message, what", BAD)
def test_a_bad_argument_is_named_before_any_token(error, message, what):
    with pytest.raises(error, match=message):
        tiny().generate_stream(**{"idx": prompt(2, 3), "max_new_tokens": 5} | what)


def test_numbers_of_other_kinds():
    """As nanoGPT takes them, or what a caller has at hand."""
    model, idx = tiny(), prompt(2, 3)
    expected = model.generate(idx, 4, temperature=0, lengths=torch.tensor([2, 3]))
    count = torch.tensor(4)
    assert torch.equal(model.generate(idx, count, temperature=0, lengths=[2, 3]), expected)


def test_every_id_may_be_kept(monkeypatch):
    """A sum of probabilities is rounded: ids behind the place where it reaches 1 would be lost."""
    logits = torch.arange(-40.0, 0.0)[None].expand(2, -1)
    drawn = []
    for top_p in (None, 1.0):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            patch.setattr(draws, "_race", lambda p: p)
            patch.setattr(draws, "_may_race", lambda p: True)
            drawn.append(draws.Sampling(top_p=top_p).draw(logits))
    assert torch.equal(*drawn) and (drawn[0] > 0).all()
