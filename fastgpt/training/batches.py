"""Which batch a step trains on: decided by seed, step and micro-batch, whoever computes it.

A resumed run, on any number of processes, draws what an uninterrupted one would have drawn.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastgpt.data import Split, random_windows
from fastgpt.train_step import Batch


def seed_of(*what: int | str) -> int:
    """A seed below 2^63 for each `what`: no two are related."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def windows(split: Split, batch_size: int, block_size: int, seed: int) -> Tensor:
    """(B, T + 1) int64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return random_windows(split, batch_size, block_size, generator)


def moved(rows: Tensor, device: torch.device) -> Batch:
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Batches:
    """This process's batches of every step, the next step's read meanwhile by another thread."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        block_size: int,
        seed: int,
        mine: Sequence[int],
        device: torch.device,
    ):
        self.split, self.size = split, (batch_size, block_size)
        self.seed, self.mine, self.device = seed, mine, device
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[list[Tensor]]] | None = None

    def of_step(self, step: int) -> list[Batch]:
        if self._next is None or self._next[0] != step:
            self._ask(step)
        assert self._next is not None
        rows = self._next[1].result()
        self._ask(step + 1)
        return [moved(r, self.device) for r in rows]

    def _ask(self, step: int) -> None:
        self._next = step, self._thread.submit(self._read, step)

    def _read(self, step: int) -> list[Tensor]:
        rows = [
            windows(self.split, *self.size, seed_of("batch", self.seed, step, micro))
            for micro in self.mine
        ]
        # from pinned memory the copy to a GPU does not hold up the CPU
        return [r.pin_memory() for r in rows] if self.device.type == "cuda" else rows

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
