"""Where the time of a profiled step went: torch.profiler's Chrome trace, sorted into the groups of
roofline.py.

On CUDA the time is that of kernels and copies on the device; each is traced back, through the call
that launched it, to the PyTorch ops around that call. On a CPU it is the time of each op without
the ops inside it. A matrix product is told by its shapes, anything else by its names.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from bench.harness.roofline import Shape

Event = dict[str, Any]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
OTHER = "the rest"

# Parts of names without their underscores, the more telling first. Kernels that torch.compile fused
# carry the names of all that they fuse.
WORDS = (
    ("attention", ("attention", "sdpa", "fmha", "flash")),
    ("loss", ("crossentropy", "logsoftmax", "nllloss")),
    ("embedding", ("embedding",)),
    ("norm", ("layernorm",)),
    ("mlp", ("gelu",)),
    ("optimizer", ("adam", "foreach", "clipgrad", "optimizer")),
)
MATMULS = ("mm", "addmm", "linear", "mkldnnlinear", "gemmgeluforward")


class Span(NamedTuple):
    name: str  # of the kernel, or of the op on a CPU
    group: str
    start: float  # seconds, like all that follow
    end: float
    seconds: float  # without what runs inside it


class Gap(NamedTuple):
    seconds: float
    before: str  # what ended before it
    after: str


def spans(trace: dict[str, Any], shape: Shape) -> list[Span]:
    """What ran on the device in order of time; on a CPU, all ops. ValueError if there is none."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    matmuls = matmul_groups(shape)
    timeline = [_on_host(e, chain, inner, matmuls) for e, chain, inner in _nested(events)
                if e["cat"] == "cpu_op"]  # fmt: skip
    if kernels := [e for e in events if e["cat"] in ON_DEVICE]:
        launched_in = {
            e["args"]["correlation"]: chain
            for e, chain, _ in _nested(events)
            if e["cat"] in LAUNCHES and "correlation" in e.get("args", {})
        }
        timeline = [_on_device(e, launched_in, matmuls) for e in kernels]
    if not timeline:
        raise ValueError("the trace holds neither kernels nor ops: nothing ran while profiling")
    return sorted(timeline, key=lambda span: span.start)


def _on_host(e: Event, chain: list[Event], inner: float, matmuls: dict) -> Span:
    start, duration = 1e-6 * e["ts"], 1e-6 * e["dur"]
    group = _group("", [*chain, e], matmuls)
    return Span(e["name"], group, start, start + duration, max(duration - 1e-6 * inner, 0.0))


def _on_device(e: Event, launched_in: dict[int, list[Event]], matmuls: dict) -> Span:
    start, duration = 1e-6 * e["ts"], 1e-6 * e["dur"]
    chain = launched_in.get(e.get("args", {}).get("correlation"), [])
    group = _group(e["name"], chain, matmuls)
    return Span(e["name"], group, start, start + duration, duration)


def _nested(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event], float]]:
    """Every host event with those around it, outermost first, and the microseconds of the ops
    directly inside it."""
    threads: dict[Any, list[Event]] = {}
    for e in events:
        if e["cat"] in ("cpu_op", "user_annotation", *LAUNCHES):
            threads.setdefault((e["pid"], e["tid"]), []).append(e)
    for thread in threads.values():
        thread.sort(key=lambda e: (e["ts"], -e["dur"]))
        inner = {id(e): 0.0 for e in thread}
        chains = []
        around: list[Event] = []
        for e in thread:
            while around and around[-1]["ts"] + around[-1]["dur"] <= e["ts"]:
                around.pop()
            ops = (outer for outer in reversed(around) if outer["cat"] == "cpu_op")
            if e["cat"] == "cpu_op" and (outer := next(ops, None)):
                inner[id(outer)] += e["dur"]
            chains.append(list(around))
            around.append(e)
        for e, chain in zip(thread, chains, strict=True):
            yield e, chain, inner[id(e)]


def _group(kernel: str, chain: list[Event], matmuls: dict[tuple[int, ...], str]) -> str:
    """By the kernel's own name, else by the innermost op that tells."""
    if group := by_words(kernel):
        return group
    for e in reversed(chain):
        name = _plain(e["name"])
        if name.split("::")[-1] in MATMULS:
            sizes = _matmul_sizes(e.get("args", {}).get("Input Dims", []))
            return matmuls.get(sizes, OTHER)
        if group := by_words(name):
            return group
    return OTHER


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def by_words(name: str) -> str:
    name = _plain(name)
    return next((group for group, words in WORDS if any(w in name for w in words)), "")


def _matmul_sizes(dims: list[Any]) -> tuple[int, ...]:
    """The three sizes of a product in any order: its forward and both gradients share them."""
    matrices = [d for d in dims if isinstance(d, list) and len(d) >= 2][:2]
    if len(matrices) < 2:
        return ()
    (*rows, inner), second = matrices
    outer = math.prod(second) // inner if inner else 0
    return tuple(sorted((math.prod(rows), inner, outer)))


def matmul_groups(shape: Shape) -> dict[tuple[int, ...], str]:
    N, C, V = shape.B * shape.T, shape.n_embd, shape.vocab_size
    layers = {
        (N, C, V): "head",
        (N, C, 4 * C): "mlp",
        (N, C, C): "qkv and proj",
        (N, C, 3 * C): "qkv and proj",
    }
    return {tuple(sorted(sizes)): group for sizes, group in layers.items()}


def gaps(timeline: list[Span]) -> list[Gap]:
    """The times between first start and last end when nothing ran, longest first."""
    idle, last = [], timeline[0]
    for span in timeline[1:]:
        if span.start > last.end:
            idle.append(Gap(span.start - last.end, last.name, span.name))
        if span.end > last.end:
            last = span
    return sorted(idle, reverse=True)


def by_group(timeline: list[Span]) -> dict[str, float]:
    """Seconds of every group, largest first."""
    sums: dict[str, float] = {}
    for span in timeline:
        sums[span.group] = sums.get(span.group, 0.0) + span.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def by_name(timeline: list[Span]) -> dict[tuple[str, str], list[float]]:
    """(name, group) -> seconds of each call, largest sum first."""
    calls: dict[tuple[str, str], list[float]] = {}
    for span in timeline:
        calls.setdefault((span.name, span.group), []).append(span.seconds)
    return dict(sorted(calls.items(), key=lambda item: -sum(item[1])))
