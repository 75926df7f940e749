"""A function that does the same on the same memory every time, replayed: on CUDA from graphs, on a
CPU from the C calls that native.py recorded.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Replayable(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Replayable]  # notes what the function launches, no more


class Graphs:
    """`run(*key)` for keys of which there are few.

    A key's first call runs as it is, which compiles its kernels; the second captures, and from
    there on it is a replay: one launch for the host. Without `capture` every call runs as it is.
    """

    def __init__(self, run: Callable[..., None], capture: Capture | None):
        self.run, self.capture = run, capture
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: dict[tuple[int, ...], Replayable] = {}

    def __call__(self, *key: int) -> None:
        if self.capture is None or key not in self.seen:
            self.seen.add(key)
            self.run(*key)
            return
        if key not in self.graphs:
            self.graphs[key] = self.capture(lambda: self.run(*key))
        self.graphs[key].replay()


def capture_for(device: torch.device, run: Any) -> Capture | None:
    """How steps on the device, made of `run`'s functions, are captured; None if they are not."""
    return _capture if device.type == "cuda" else getattr(run, "Recording", None)


def _capture(run: Callable[[], None]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
