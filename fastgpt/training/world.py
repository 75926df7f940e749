"""The processes of a job, as torchrun or SLURM started them; without either, one.

Small facts that all must agree on go through gloo on the CPUs, gradients through NCCL or gloo.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.training import watch
from fastgpt.training.watch import LostProcess, Watch


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(
            f"{name}={value!r} in the environment must be a number; start with torchrun"
        )
    return int(value)


def rank() -> int:
    return _number("RANK", 0)


def restarts() -> int:
    """How often torchrun has started this job's processes again."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


class World:
    """`with World(device) as world`: what a process knows of the others."""

    def __init__(self, device: str | None = None):
        self.launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank, self.size = rank(), _number("WORLD_SIZE", 1)
        if self.size > 1 and not self.launched:
            raise ValueError(
                f"WORLD_SIZE={self.size} is in the environment and RANK is not; start with "
                "torchrun, or unset WORLD_SIZE"
            )
        if self.rank >= self.size:
            raise ValueError(
                f"RANK={self.rank} in the environment must be below WORLD_SIZE={self.size}; start "
                "with torchrun"
            )
        self.local_rank = _number("LOCAL_RANK", 0)
        self.watch: Watch | None = None
        self._control: Any = None
        if not self.launched:
            return
        on_gpu = torch.cuda.is_available() and device != "cpu"
        if on_gpu and self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.rank} is number {self.local_rank} of its machine, which has "
                f"{torch.cuda.device_count()} GPUs; start as many processes as GPUs, or use "
                "--device cpu"
            )
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        backend, patience = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timedelta(minutes=30)
        where = dict(store=watch.own_part(watch.connect(self.rank)), rank=self.rank)
        dist.init_process_group(backend, timeout=patience, world_size=self.size, **where)
        self._control = dist.new_group(backend="gloo", timeout=patience)
        if self.size > 1:
            self.watch = Watch(self.rank, self.size)
            dist.barrier(self._control)
            self.watch.start()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """The device of this process, where `name` leaves the choice."""
        if self.launched and torch.cuda.is_available() and name in (None, "cuda"):
            return f"cuda:{self.local_rank}"
        return name

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: every size-th."""
        return range(self.rank, count, self.size)

    def largest(self, values: Sequence[float]) -> list[float]:
        """For each number the largest that any process has."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, dist.ReduceOp.MAX, self._control)
        return t.tolist()

    def sum(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(self._control)

    def told(self, text: str | None) -> str:
        """The first process's text, in every process."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, 0, self._control)
        assert texts[0] is not None
        return texts[0]

    def writing(self) -> AbstractContextManager[Any]:
        """A block in which the loss of another process does not end this one."""
        return nullcontext() if self.watch is None else self.watch.busy

    def check_same(self, what: str, value: Any) -> None:
        """ValueError unless every process has this value."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._control)
        for other, other_value in enumerate(values):
            if other_value != values[0]:
                raise ValueError(
                    f"process {other} has another {what} than process 0: {other_value!r:.80}, not "
                    f"{values[0]!r:.80}; all must read the same files"
                )

    def explained(self, error: RuntimeError) -> RuntimeError:
        """The error of a collective, with the process that is lost if one is."""
        if isinstance(error, LostProcess):
            return error
        lost = self.watch.reason() if self.watch and _is_of_a_collective(error) else None
        return LostProcess(f"{lost}; the job ends") if lost else error

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self.launched:
            return
        if error is not None and self.watch is not None:
            if not isinstance(error, LostProcess):
                self.watch.tell(str(error) or type(error).__name__)
            return  # what waits for the others would wait in vain
        self.wait()
        if self.watch is not None:
            self.watch.stop()
        dist.destroy_process_group()


def _is_of_a_collective(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "peer", "timed out", "store", "socket", "broken pipe")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in words)
