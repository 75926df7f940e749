"""How a training run says where it is, and where it notices a loss that is not finite."""

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastgpt.storage.files import readable
from fastgpt.storage.printable import printable


class Step(NamedTuple):
    number: int
    loss: Tensor  # may be on a device: reading it would wait for the step
    lr: float


class Progress:
    """One line that is rewritten on a terminal, and a new one every ten seconds elsewhere.

    `log` gets the steps of each line, and `mfu` gives the model FLOP/s over the device's, from the
    seconds of a step.
    """

    def __init__(
        self,
        tokens_per_step: int,
        fraction: float,
        mfu: Callable[[float], float],
        device: torch.device,
        log: Callable[[list[dict[str, float]]], None],
        quiet: bool = False,
    ):
        self.tokens_per_step, self.mfu, self.device = tokens_per_step, mfu, device
        self.log, self.quiet = log, quiet
        self.steps: list[Step] = []  # since the line before
        self.pace = _Pace(fraction)
        self.shown = time.perf_counter()
        self.every = 0.0  # the first step at once: it says that all is well
        self.bar: Any = None
        if sys.stdout.isatty() and not quiet:
            tqdm.monitor_interval = 0
            form = "{desc} |{bar}|"  # cut to the terminal's width
            self.bar = tqdm(
                total=1.0, bar_format=form, dynamic_ncols=True, file=sys.stdout, leave=False
            )

    def add(self, step: int, loss: Tensor, lr: float, fraction: float) -> None:
        """`step` steps are done, `fraction` of the run: shown if it is time."""
        self.steps.append(Step(step, loss, lr))
        if time.perf_counter() - self.shown >= self.every:
            self.show(fraction)

    def show(self, fraction: float) -> None:
        """Log and print the steps since the line before: waits for the device. FloatingPointError
        names the first whose loss is not finite, when those before are logged.
        """
        if not self.steps:
            return
        steps, self.steps = self.steps, []
        losses = torch.stack([s.loss for s in steps]).tolist()
        finite = next((i for i, x in enumerate(losses) if not math.isfinite(x)), len(losses))
        logged = [
            dict(step=s.number, loss=loss, lr=s.lr) for s, loss in zip(steps, losses, strict=True)
        ]
        if finite < len(steps):
            self.log(logged[:finite])
            raise FloatingPointError(
                f"the loss is {losses[finite]} at step {steps[finite].number}; try a lower --lr or "
                "a longer --warmup. A checkpoint that was saved is from before that"
            )
        now = time.perf_counter()
        seconds = max(now - self.shown, 1e-9) / len(steps)
        self.shown, self.every = now, 0.5 if self.bar is not None else 10.0
        rate, used = self.tokens_per_step / seconds, self.mfu(seconds)
        last, eta = steps[-1], self.pace.remaining(now, fraction)
        logged[-1] |= dict(tokens_per_second=rate, peak_memory=peak_memory(self.device))
        if not math.isnan(used):
            logged[-1]["mfu"] = used
        self.log(logged)
        if not self.quiet:
            share = "" if math.isnan(used) else f"  MFU {used:.1%}"
            self._write(
                f"step {last.number:,}  loss {losses[-1]:.4f}  ETA {clock(eta)}  {thousands(rate)} "
                f"tok/s  lr {last.lr:.1e}{share}  {readable(peak_memory(self.device))}",
                fraction,
            )

    def note(self, text: str) -> None:
        if self.bar is not None:
            tqdm.write(printable(text), file=sys.stdout)
        elif not self.quiet:
            print(printable(text), flush=True)
        self.shown = time.perf_counter()  # what was noted took time, but not training's

    def _write(self, text: str, fraction: float) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.n = min(fraction, 1.0)
            self.bar.set_description_str(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Pace:
    """How long the rest takes, validations included, by what was done since the first line."""

    def __init__(self, fraction: float):
        self.start: tuple[float, float] = time.perf_counter(), fraction
        self.first = True

    def remaining(self, now: float, fraction: float) -> float:
        since, before = self.start
        done = fraction - before
        seconds = (now - since) * max(1 - fraction, 0) / done if done > 0 else math.nan
        if self.first:  # which compiled and allocated
            self.start, self.first = (now, fraction), False
        return seconds


def clock(seconds: float) -> str:
    """h:mm:ss"""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def thousands(rate: float) -> str:
    return f"{rate / 1000:,.1f}k" if rate >= 10_000 else f"{rate:,.0f}"


def peak_memory(device: torch.device) -> int:
    """Bytes, of the GPU or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
