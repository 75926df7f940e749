"""Ctrl-C and SIGTERM, noted until a step is over and saved."""

import os
import signal
from types import FrameType
from typing import Any


class Interrupts:
    """`with Interrupts() as interrupts`: the first ones only leave their `interrupts.number`.

    The third Ctrl-C, for somebody whose step does not end, interrupts at once, unless a checkpoint
    is being written.
    """

    def __init__(self) -> None:
        self.noted = self.number = 0
        self.saving = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.noted, self.number = self.noted + 1, number
        if self.noted == 2 and not self.saving:
            os.write(2, b"\nstopping after this step; Ctrl-C again loses it\n")
        if self.noted > 2 and number == signal.SIGINT and not self.saving:
            raise KeyboardInterrupt

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
