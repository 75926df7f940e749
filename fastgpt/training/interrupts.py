"""Ctrl-C, SIGTERM and a closed terminal's SIGHUP, noted until a step is over and saved."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any


class Interrupts:
    """`with Interrupts() as interrupts`: a signal only sets `interrupts.number`.

    For a step that does not end: a Ctrl-C that comes `PATIENCE` seconds after the first signal
    interrupts at once, unless `saving` a checkpoint or `updating()` weights: soon done, and half of
    it is worth nothing.
    """

    PATIENCE = 5.0

    def __init__(self) -> None:
        self.number = 0
        self.first = 0.0
        self.saving = self.quiet = False
        self.updating: Callable[[], bool] = lambda: False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        self.first = self.first or now
        self.number = number
        if number != signal.SIGINT or self.saving or self.updating():
            return
        if now - self.first > self.PATIENCE:
            raise KeyboardInterrupt
        if not self.quiet:
            with suppress(OSError):  # nobody reads it any more
                os.write(2, b"\nstopping after this step; Ctrl-C some seconds from now loses it\n")

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
