"""Weights moved to pages of 2 MB while a CPU decodes: the same values, and little time for it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.decoding import huge_pages
from fastgpt.decoding.huge_pages import PAGE, HugePages
from tests.decoding.test_in_c import IN_C

SMAPS = Path("/proc/self/smaps_rollup")


class Moves:
    """In place of the system's: each page takes `seconds`, of a clock that nothing else moves."""

    def __init__(self, monkeypatch, seconds: float = 0.0, allowed: int = 10**9):
        self.pages: list[int] = []
        self.now, self.seconds, self.allowed = 0.0, seconds, allowed
        monkeypatch.setattr(huge_pages, "_madvise", self)
        monkeypatch.setattr(huge_pages, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def __call__(self, address: int, size: int, advice: int) -> int:
        assert size == PAGE
        self.pages.append(address)
        self.now += self.seconds
        return 0 if len(self.pages) <= self.allowed else -1


def in_huge_pages() -> int:
    if not SMAPS.exists():
        return 0
    lines = (line.split() for line in SMAPS.read_text().splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == "AnonHugePages:")


def at(start: int, nbytes: int) -> Tensor:
    """Stands for a tensor there."""

    class Placed(Tensor):
        def data_ptr(self) -> int:
            return start

        @property
        def nbytes(self) -> int:
            return nbytes

    return torch.empty(0).as_subclass(Placed)


@pytest.mark.parametrize(
    "ranges, pages",
    [
        ([], []),
        ([(8 * PAGE, PAGE)], [8]),
        ([(8 * PAGE, PAGE - 1)], []),
        ([(8 * PAGE + 1, 2 * PAGE)], [9]),
        ([(8 * PAGE - 1, 2 * PAGE + 1)], [8, 9]),
        ([(9 * PAGE, PAGE), (8 * PAGE, PAGE)], [8, 9]),
        ([(8 * PAGE, PAGE // 2), (8 * PAGE + PAGE // 2 + 4096, PAGE)], [8]),
        ([(8 * PAGE, PAGE // 2), (10 * PAGE, PAGE)], [10]),
        ([(8 * PAGE, 3 * PAGE), (8 * PAGE, 3 * PAGE), (9 * PAGE, PAGE)], [8, 9, 10]),
    ],
)
def test_pages_are_whole_and_come_once(monkeypatch, ranges, pages):
    moves = Moves(monkeypatch)
    HugePages(at(*r) for r in ranges).move(1)
    assert moves.pages == [page * PAGE for page in pages]


def test_pages_take_their_share_of_the_time(monkeypatch):
    """A page takes ten seconds and a call has four, so that every second or third call moves one;
    in the first milliseconds none is moved.
    """
    moves, pages = Moves(monkeypatch, seconds=10), HugePages([at(0, 100 * PAGE)])
    pages.move(0.004)
    assert moves.now == 0
    for call in range(1, 21):
        pages.move(4)
        assert 4 * call - 0.005 <= moves.now < 4 * call + 10
    assert len(moves.pages) == 8


@pytest.mark.parametrize("allowed", [0, 3])
def test_a_page_that_cannot_be_moved_is_the_last(monkeypatch, allowed):
    moves, pages = Moves(monkeypatch, allowed=allowed), HugePages([at(0, 100 * PAGE)])
    for _ in range(5):
        pages.move(1)
    assert len(moves.pages) == allowed + 1


@pytest.mark.parametrize("where", ["another system", "a forked process"])
def test_where_no_page_is_moved(where, monkeypatch):
    if where == "a forked process":
        monkeypatch.setattr(huge_pages, "_LOADED_IN", -1)
    else:
        monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    huge_pages._libc_madvise.cache_clear()
    try:
        pages, before = HugePages([torch.randn(PAGE)]), in_huge_pages()
        pages.move(1)
        assert next(pages.left, None) is None and in_huge_pages() == before
    finally:
        huge_pages._libc_madvise.cache_clear()


@pytest.mark.skipif(not SMAPS.exists(), reason="what lies in huge pages is read in /proc")
def test_values_stay():
    before, weight = in_huge_pages(), torch.randn(8 * PAGE // 4 + 5)
    expected, address = weight.clone(), weight.data_ptr()
    pages = HugePages([weight])
    if huge_pages._madvise(next(pages.left), PAGE, huge_pages._COLLAPSE) != 0:
        pytest.skip("this system moves no pages (before Linux 6.1, or not allowed)")
    pages.move(60)
    assert in_huge_pages() >= before + 7 * PAGE
    assert torch.equal(weight, expected) and weight.data_ptr() == address


@IN_C
def test_decoding_moves_its_weights(monkeypatch):
    config = GPTConfig(block_size=32, vocab_size=4096, n_layer=1, n_head=4, n_embd=256)
    model, idx = GPT(config).eval(), torch.zeros(1, 1, dtype=torch.int64)
    expected = model.generate(idx, 9, temperature=0)
    moves = Moves(monkeypatch)
    monkeypatch.setattr(huge_pages, "_BEFORE", 0.0)
    assert torch.equal(model.generate(idx, 9, temperature=0), expected)
    head = model.lm_head.weight
    within = [head.data_ptr() <= page < head.data_ptr() + head.nbytes for page in moves.pages]
    assert sum(within) >= head.nbytes // PAGE - 1
