"""Weights in pages of 2 MB instead of 4 KB, on Linux: a CPU reads them 8 to 29 % faster.

Only where they lie in physical memory changes. Moving a page takes as long as it then saves in tens
to hundreds of tokens, so a step moves only some. A forked process moves none: it shares its
parent's memory and would get copies.
"""

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

PAGE = 2**21  # bytes
_GAP = 2**16  # between tensors that are as good as one: what an allocator keeps for itself
_LOADED_IN = os.getpid()
_BEFORE = 0.005  # seconds to save up before the first page: who wants a few tokens moves none
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1


class HugePages:
    """The pages that lie wholly in `tensors`, or in neighbours among them."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = sorted(tensors, key=lambda t: t.data_ptr())
        self.left = _pages(self.tensors)
        self.owed = _BEFORE  # seconds that pages took too long, or are to wait

    def move(self, seconds: float) -> None:
        """Move pages for so long. What the last one took longer is taken from later calls. A page
        that this system cannot move, or has no free memory for, is the last.
        """
        start = time.perf_counter()
        while time.perf_counter() - start < seconds - self.owed:
            page = next(self.left, None)
            if page is None:
                return
            if _madvise(page, PAGE, _COLLAPSE) != 0:
                self.left = iter(())
        self.owed += time.perf_counter() - start - seconds


def _pages(tensors: list[Tensor]) -> Iterator[int]:
    """The pages' addresses; tensors come in the order of theirs."""
    start = end = 0  # of tensors as good as one
    for t in tensors:
        if t.data_ptr() > end + _GAP:
            yield from _whole_pages(start, end)
            start = t.data_ptr()
        end = max(end, t.data_ptr() + t.nbytes)
    yield from _whole_pages(start, end)


def _whole_pages(start: int, end: int) -> range:
    return range(-(-start // PAGE) * PAGE, end // PAGE * PAGE, PAGE)


def _madvise(address: int, size: int, advice: int) -> int:
    """0 where it was followed."""
    function = _libc_madvise() if os.getpid() == _LOADED_IN else None
    return -1 if function is None else function(address, size, advice)


@functools.cache
def _libc_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
