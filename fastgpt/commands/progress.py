"""How a training run says where it is, and where it notices a loss that is not finite."""

import math
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastgpt.commands.train import Trainer


class Progress:
    """One line that is rewritten on a terminal, and a new one every ten seconds elsewhere."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        self.live = sys.stdout.isatty()
        self.losses: list[Tensor] = []  # of the steps since the line before
        self.shown = self.started = time.perf_counter()
        self.fraction_before = trainer.fraction()

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss)
        if time.perf_counter() - self.shown > (0.5 if self.live else 10):
            self.show()

    def show(self) -> None:
        if not self.losses:
            return
        trainer, cfg = self.trainer, self.trainer.config
        loss = _last_if_finite(self.losses, trainer.step)  # waits for the device: before the clock
        now, done = time.perf_counter(), trainer.fraction()
        tokens_per_step = cfg.batch_size * cfg.grad_accum * trainer.model.config.block_size
        rate = len(self.losses) * tokens_per_step / (now - self.shown)
        eta = (now - self.started) * max(1 - done, 0) / (done - self.fraction_before)
        bar = "#" * round(20 * min(done, 1))
        text = f"[{bar:.<20}] step {trainer.step:,}  loss {loss:.4f}  {rate:,.0f} tok/s"
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
