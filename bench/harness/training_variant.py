"""One variant in training: built, warmed up, timed a round at a time, and let go again."""

import gc
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from bench.peers import models
from bench.peers.training import VARIANTS, Batches, Run, Step

Row = dict[str, Any]
MAX_NAME = 160  # of a kernel: templates' names go on for pages
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# what attention leaves in a profile: operators of PyTorch, and kernels where a graph is replayed
_ATTENTION = {
    "flash-attn": r"(?<!pytorch_)flash::|flash_attn::",
    "SDPA cudnn": r"scaled_dot_product_cudnn|cudnn.*sdpa",
    "SDPA flash": r"scaled_dot_product_flash|pytorch_flash",
    "SDPA efficient": r"scaled_dot_product_efficient|fmha_cutlass",
    "SDPA math": r"scaled_dot_product_attention_math",
    "fastgpt kernel": r"^_dkdv_kernel",  # of kernels/attention_backward.py
    "fastgpt C": r"^native_attention",  # of fastgpt/implementations/native.c
}


class Variant:
    """Every round trains on the same batches, so that the loss falls and a wrong gradient shows."""

    EARLY = -1  # the turn taken as soon as the variant is built, in case that nothing comes after

    def __init__(self, name: str, run: Run, batches: Batches, caches: Path):
        self.name, self.run, self.batches = name, run, batches
        self.caches = caches / name
        self._step: Step | None = None
        self._held = 0  # bytes on the device between rounds
        self._replayed = 0  # bytes that a CUDA graph uses again and again, which nobody counts
        self.losses: list[float] = []
        self.samples: dict[int, float] = {}  # turn -> seconds per step; see timed()
        self.first_step = math.nan
        self.peak_bytes: int | None = None
        self.attention = "not seen"
        self.kernels: list[Row] = []  # of one step on a GPU; see kernels_in()
        self.span = 0.0  # microseconds from that step's first kernel to its last
        self.problem = ""
        self.out_of_memory = self.device_lost = False

    def attempt(self, action: Callable[..., None], *args: Any) -> None:
        """A variant that cannot run here becomes a row that says so; the others go on."""
        if self.problem:
            return
        try:
            action(self, *args)
        except Exception as error:
            self.out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self.problem = describe(error)
            self._step = None
        if self.problem:  # not inside the `except`, whose traceback holds tensors
            try:
                _free()
            except Exception:  # after a fault in a kernel every call on the device fails
                self.device_lost = True

    def timed(self) -> dict[int, float]:
        """The samples to go by: the early one counts until there are others."""
        rounds = {turn: s for turn, s in self.samples.items() if turn != self.EARLY}
        return rounds or self.samples

    def build(self) -> None:
        """Compile caches start empty, so that the first step takes what it takes a new user."""
        for name in _CACHES:
            os.environ[name] = str(self.caches / name.lower())
        before, graphs = _allocated(self.run.device), _idle_in_graphs(self.run.device)
        self._step = VARIANTS[self.name](self.run)
        start = time.perf_counter()
        loss = self._step(*self.batches[0]).item()
        if math.isnan(self.first_step):
            self.first_step = time.perf_counter() - start
        self.losses.append(loss)
        self.train()
        self._held = _allocated(self.run.device) - before
        self._replayed = _idle_in_graphs(self.run.device) - graphs

    def train(self) -> None:
        """A step on every batch."""
        assert self._step is not None
        losses = [self._step(x, y) for x, y in self.batches]
        self.losses += [loss.item() for loss in losses]  # waits for the device

    def round(self, turn: int) -> None:
        on_gpu = self.run.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        others = _allocated(self.run.device) - self._held
        start = time.perf_counter()
        self.train()
        self.samples[turn] = (time.perf_counter() - start) / len(self.batches)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() - others + self._replayed
            self.peak_bytes = max(peak, self.peak_bytes or 0)

    def look(self) -> None:
        """What ran, by a profile of one step; after the timed rounds, which it slows."""
        assert self._step is not None
        activities = [ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as seen:
            self._step(*self.batches[0]).item()
        events = seen.events()
        self.attention = attention_in({event.name for event in events})
        on_device = [event for event in events if _on_device(event)]
        self.kernels, self.span = kernels_in(on_device), span_of(on_device)

    def release(self) -> None:
        """Drop the model, and compiled code, which keeps its model and the shapes it has seen."""
        self._step = None
        torch.compiler.reset()
        _free()


def attention_in(names: set[str]) -> str:
    """The attention that left `names` in a profile."""
    attentions = [
        attention
        for attention, pattern in _ATTENTION.items()
        if any(re.search(pattern, name) for name in names)
    ]
    return " + ".join(attentions) or "not seen"


def _on_device(event: FunctionEvent) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def kernels_in(on_device: list[FunctionEvent]) -> list[Row]:
    """{"kernel", "launches", "us"}, copies and fills too; what took longest first."""
    spent: dict[str, list[float]] = {}
    for event in on_device:
        spent.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows = [
        {"kernel": name[:MAX_NAME], "launches": len(times), "us": round(sum(times), 1)}
        for name, times in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def span_of(on_device: list[FunctionEvent]) -> float:
    """Microseconds from the first start to the last end: what exceeds the sum is waiting."""
    times = [event.time_range for event in on_device]
    return max((t.end for t in times), default=0.0) - min((t.start for t in times), default=0.0)


@contextmanager
def empty_caches() -> Iterator[Path]:
    """A folder for the compile caches of all variants, which is gone afterwards."""
    before = {name: os.environ.get(name) for name in _CACHES}
    with tempfile.TemporaryDirectory(prefix="fastgpt-", ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def describe(error: Exception) -> str:
    """Why a variant has no time, in a line."""
    text = str(error)
    if isinstance(error, models.Absent):
        return text
    wanted = re.search(r"Tried to allocate ([\d.]+) (\w+)", text)
    free = re.search(r"of which ([\d.]+) (\w+) is free", text)
    if isinstance(error, torch.OutOfMemoryError) and wanted and free:
        short = _gibibytes(wanted) - _gibibytes(free)
        return f"does not fit: at least {short:.1f} GiB of device memory were missing"
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:120]}"


def _gibibytes(match: re.Match[str]) -> float:
    return float(match[1]) / {"bytes": 2**30, "KiB": 2**20, "MiB": 2**10, "GiB": 1}[match[2]]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _idle_in_graphs(device: torch.device) -> int:
    """Bytes that belong to captured graphs, without the tensors in them that live on."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    own = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in own)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
