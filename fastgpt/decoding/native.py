"""A decoding step on a CPU at the rate of memory: native.c, compiled once by the machine's C
compiler.

PyTorch's GEMV reads weights at half a core's bandwidth in fp32 and at a quarter in bf16. Where
there is no compiler, eager.py runs instead. The functions are those of eager.py, on fp32
activations, fp32, bf16 or int8 weights, and fp32 or bf16 caches, contiguous.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.decoding import eager
from fastgpt.decoding.eager import Norm, Weight
from fastgpt.implementations.compiled import library

_SOURCE = Path(__file__).with_name("native.c")
_CACHES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_WEIGHTS = _CACHES | {torch.int8: "int8"}
_ACTIVATIONS = {None: 0, "none": 1, "tanh": 2}  # as native.c numbers them
MAX_ROWS = 8


class Recording:
    """The calls of a step, to be made again without what Python does before each of them: that
    takes a millisecond a token at 12 layers.
    """

    def __init__(self, run: Callable[[], None]):
        global _recording
        self.calls: list[Callable[[], object]] = []
        self.kept: list[Tensor] = []  # memory that only these calls know of
        _recording = self
        try:
            run()
        finally:
            _recording = None

    def replay(self) -> None:
        for call in self.calls:
            call()


_recording: Recording | None = None


def _do(function: Callable[..., object], *args: Any) -> None:
    """Now, or when what is being recorded is replayed."""
    if _recording is None:
        function(*args)
    else:
        _recording.calls.append(functools.partial(function, *args))


def embed(out: Tensor, ids: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> None:
    _do(eager.embed, out, ids, positions, wte, wpe)


def linear(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None = None,
    residual: Tensor | None = None, approximate: str | None = None,
) -> None:  # fmt: skip
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    norm_weight, norm_bias = norm or (None, None)
    tensors = map(_address, (x, values, scales, bias, norm_weight, norm_bias, residual, out))
    sizes = len(x), *values.shape, _ACTIVATIONS[approximate], torch.get_num_threads()
    _do(_functions("linear")[values.dtype], *tensors, *sizes)


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, longest: int,
    weight: Weight, bias: Tensor | None,
) -> None:  # fmt: skip
    y = torch.empty_like(out)
    if _recording is not None:
        _recording.kept.append(y)
    tensors = map(_address, (qkv, keys, values, positions, y))
    sizes = len(qkv), *keys.shape, torch.get_num_threads()
    _do(_functions("attend")[keys.dtype], *tensors, *sizes)
    linear(out, y, weight, bias, residual=out)


def advance(positions: Tensor, last: Tensor) -> None:
    _do(eager.advance, positions, last)


def unsupported(tensors: tuple[Tensor, ...], head_dim: int, rows: int = 1) -> str | None:
    """Why these cannot decode with such a cache, or None. Compiles at the first question."""
    (like,) = tensors
    if rows > MAX_ROWS:
        return f"{rows} rows are more than {MAX_ROWS}: a GEMM reuses the weights better"
    if like.device.type != "cpu" or like.dtype not in _CACHES:
        return f"{like.dtype} on {like.device.type} is neither float32 nor bfloat16 on a CPU"
    outcome = library(_SOURCE)
    return outcome if isinstance(outcome, str) else None


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@functools.cache
def _functions(name: str) -> dict[torch.dtype, Any]:
    pointers, sizes, words = (8, 5, _WEIGHTS) if name == "linear" else (5, 6, _CACHES)
    by_dtype = {dtype: getattr(library(_SOURCE), f"{name}_{word}") for dtype, word in words.items()}
    for function in by_dtype.values():
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int] * sizes
        function.restype = None
    return by_dtype
