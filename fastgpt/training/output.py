"""What a run prints may lose its reader, as `fastgpt train | head` does: training goes on."""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


def discard(stream: TextIO) -> None:
    """Everything written to it from now on is lost, also what it flushes when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class Output(io.TextIOBase):
    """A stream for a stdout. Once that cannot be written to, `told` is called with the reason, and
    all later text is lost.
    """

    def __init__(self, stream: TextIO, told: Callable[[OSError], None]):
        self.stream, self.told = stream, told
        self.lost = False

    def write(self, text: str) -> int:
        self._do(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self.stream.flush)

    def _do(self, what: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            what()
        except OSError as error:  # a closed pipe or terminal, a full disk
            self.lost = True
            discard(self.stream)
            with suppress(OSError):  # of a stderr that went the same way
                self.told(error)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def isatty(self) -> bool:
        return not self.lost and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()
