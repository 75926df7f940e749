"""A function that does the same on the same memory every time, replayed: on CUDA from graphs, on a
CPU from the C calls that step_in_c.py recorded.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Replayable(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], None]], Replayable]  # notes what the function launches, no more


class Graphs:
    """`run(*key)` for keys of which there are few.

    A key's first `patience` calls are left to `meanwhile`, which does the same; by default it is
    `run`, whose first call compiles its kernels. The next call captures, and from there on it is a
    replay: one launch for the host. Without `capture` none is.
    """

    def __init__(
        self,
        run: Callable[..., None],
        capture: Capture | None,
        meanwhile: Callable[..., None] | None = None,
        patience: int = 1,
    ):
        self.run, self.capture = run, capture
        self.meanwhile, self.patience = meanwhile or run, patience
        self.calls: Counter[tuple[int, ...]] = Counter()
        self.graphs: dict[tuple[int, ...], Replayable] = {}

    def __call__(self, *key: int) -> None:
        if self.capture is None or self.calls[key] < self.patience:
            self.calls[key] += 1
            self.meanwhile(*key)
            return
        if key not in self.graphs:
            self.graphs[key] = self.capture(lambda: self.run(*key))
        self.graphs[key].replay()


def notes_pytorch(device: torch.device) -> bool:
    """Whether a capture there notes PyTorch's ops too; a CPU's notes step.c's calls."""
    return device.type == "cuda"


def capture_for(device: torch.device, run: Any) -> Capture | None:
    """How steps on the device, made of `run`'s functions, are captured; None if they are not."""
    if device.type == "cuda":
        return _OnCuda(device)
    return run.Recorder() if hasattr(run, "Recorder") else None


class _OnCuda:
    """Captures CUDA graphs that are replayed one after the other, and leave no tensor of their own
    behind: they share the memory for what they hold meanwhile.

    Random numbers are those that the same ops would draw uncaptured. A capture draws none: the
    default generator, which every CUDAGraph registers, counts what its ops ask for, and they read
    seed and offset from memory. A replay fills in the generator's of then, whatever was seeded in
    between, and moves it on by that count (the note on graph-safe states in PyTorch's
    CUDAGeneratorImpl.h).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),  # whose generator it is
            torch.inference_mode(False),  # or no replay outside it could write seed and offset
            torch.no_grad(),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            run()
        return graph
