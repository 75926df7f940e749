"""A decoding step on a CPU at the rate of memory: step.c, compiled once by the machine's C
compiler.

PyTorch's GEMV reads weights at half a core's bandwidth in fp32 and at a quarter in bf16. Where
there is no compiler, eager.py runs instead. The functions are those of eager.py, on fp32
activations, fp32, bf16 or int8 weights, and fp32 or bf16 caches, contiguous.
"""

import ctypes
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.decoding.eager import Norm, Weight
from fastgpt.decoding.huge_pages import HugePages
from fastgpt.implementations import compiled

_SOURCE = Path(__file__).with_name("step.c")
_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_CACHES = torch.float32, torch.bfloat16
_ACTIVATIONS = {None: 0, "none": 1, "tanh": 2}  # as step.c numbers them
_MOVING = 0.1  # of a step's time, for pages of weights
MAX_ROWS = 8


class _Call(ctypes.Structure):
    """step.c's struct call"""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("pointers", ctypes.c_void_p * 8),
        ("sizes", ctypes.c_int32 * 6),
        ("weight_bytes", ctypes.c_int64),
    )


class Recorder:
    """Records the steps of a decoder."""

    pages: HugePages | None = None  # of its weights, for all its recordings

    def __call__(self, run: Callable[[], None]) -> "Recording":
        recording = Recording(run, self.pages)
        self.pages = recording.pages
        return recording


class Recording:
    """The calls of a step, to be made again as one: Python before each of them takes a millisecond
    a token at 12 layers, and so many starts of threads a few tenths.
    """

    def __init__(self, run: Callable[[], None], pages: HugePages | None = None):
        self.kept: list[Tensor] = []  # memory that only these calls know of
        self.weights: list[Tensor] = []
        self.calls: list[_Call] = []
        _of_thread.recording = self
        try:
            run()
        finally:
            _of_thread.recording = None
        self.array = (_Call * len(self.calls))(*self.calls)
        self.pages = pages or HugePages(self.weights)

    def replay(self) -> None:
        start = time.perf_counter()
        _run(self.array, len(self.array))
        self.pages.move(_MOVING * (time.perf_counter() - start))


class _OfThread(threading.local):
    recording: Recording | None = None


_of_thread = _OfThread()


def _do(
    name: str, tensors: tuple[Tensor | None, ...], *sizes: int, weight: Tensor | None = None
) -> None:
    """Now, or when what is being recorded is replayed."""
    pointers = (ctypes.c_void_p * 8)(*(None if t is None else t.data_ptr() for t in tensors))
    weight_bytes = 0 if weight is None else weight.nbytes
    call = _Call(_address(name), pointers, (ctypes.c_int32 * 6)(*sizes), weight_bytes)
    if _of_thread.recording is not None:
        _of_thread.recording.calls.append(call)
        if weight is not None:
            _of_thread.recording.weights.append(weight)
    else:
        _run(ctypes.byref(call), 1)


def _run(calls: Any, count: int) -> None:
    library: Any = compiled.library(_SOURCE)
    library.run(calls, count, torch.get_num_threads())


@functools.cache
def _address(name: str) -> int | None:
    return ctypes.cast(getattr(compiled.library(_SOURCE), name), ctypes.c_void_p).value


def embed(out: Tensor, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    _do(f"embed_{_WORDS[wte.dtype]}", (ids, positions, wte, wpe, out), *out.shape)


def linear(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None = None,
    residual: Tensor | None = None, approximate: str | None = None,
) -> None:  # fmt: skip
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    tensors = (x, values, scales, bias, *(norm or (None, None)), residual, out)
    sizes = (len(x), *values.shape, _ACTIVATIONS[approximate])
    _do(f"linear_{_WORDS[values.dtype]}", tensors, *sizes, weight=values)


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, bucket: int,
    weight: Weight, bias: Tensor | None,
) -> None:  # fmt: skip
    y = torch.empty_like(out)
    if _of_thread.recording is not None:
        _of_thread.recording.kept.append(y)
    tensors = (qkv, keys, values, positions, y)
    _do(f"attend_{_WORDS[keys.dtype]}", tensors, len(qkv), *keys.shape)
    linear(out, y, weight, bias, residual=out)


def advance(positions: Tensor, last: Tensor) -> None:
    _do("advance", (positions, last), len(positions))


def unsupported(tensors: tuple[Tensor, ...], head_dim: int, rows: int = 1) -> str | None:
    """Why these cannot decode with such a cache, or None. Compiles at the first question."""
    (like,) = tensors
    if rows > MAX_ROWS:
        return f"{rows} rows are more than {MAX_ROWS}: a GEMM reuses the weights better"
    if like.device.type != "cpu" or like.dtype not in _CACHES:
        return f"{like.dtype} on {like.device.type} is neither float32 nor bfloat16 on a CPU"
    outcome = compiled.library(_SOURCE)
    return outcome if isinstance(outcome, str) else None
