"""How a training run says where it is, and where it notices a loss that is not finite."""

import math
import sys
import time

import torch
from torch import Tensor


class Progress:
    """One line that is rewritten on a terminal, and a new one every ten seconds elsewhere."""

    def __init__(self, tokens_per_step: int, fraction: float):
        self.tokens_per_step = tokens_per_step
        self.live = sys.stdout.isatty()
        self.losses: list[Tensor] = []  # of the steps since the line before
        self.shown = self.started = time.perf_counter()
        self.fraction_before = fraction  # of the run that was done at the start

    def add(self, loss: Tensor, step: int, fraction: float) -> None:
        """`step` steps are done, `fraction` of the run; the last one's loss may be on a device."""
        self.losses.append(loss)
        if time.perf_counter() - self.shown > (0.5 if self.live else 10):
            self.show(step, fraction)

    def show(self, step: int, fraction: float) -> None:
        if not self.losses:
            return
        loss = _last_if_finite(self.losses, step)  # waits for the device: before the clock
        now = time.perf_counter()
        rate = len(self.losses) * self.tokens_per_step / (now - self.shown)
        eta = (now - self.started) * max(1 - fraction, 0) / (fraction - self.fraction_before)
        bar = "#" * round(20 * min(fraction, 1))
        text = f"[{bar:.<20}] step {step:,}  loss {loss:.4f}  {rate:,.0f} tok/s"
        self._write(f"{text}  ETA {eta // 60:.0f}:{eta % 60:02.0f}", end="" if self.live else "\n")
        self.losses, self.shown = [], now

    def note(self, text: str) -> None:
        self._write(text, end="\n")
        self.shown = time.perf_counter()  # what was noted took time, but not training's

    def _write(self, text: str, end: str) -> None:
        print(f"\r{text:<79}" if self.live else text, end=end, flush=True)


def _last_if_finite(losses: list[Tensor], step: int) -> float:
    """The loss of `step`, the last of `losses`. FloatingPointError names the first not finite."""
    values = torch.stack(losses).tolist()
    for number, value in enumerate(values, start=step - len(values) + 1):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {number}; try a lower --lr or a longer --warmup. "
                "A checkpoint that was saved is from before that"
            )
    return values[-1]
