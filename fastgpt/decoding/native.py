"""A decoding step on a CPU at the rate of memory: native.c, compiled once by the machine's C
compiler.

PyTorch's GEMV reads weights at half a core's bandwidth in fp32 and at a quarter in bf16. Where
there is no compiler, eager.py runs instead. The functions are those of eager.py, on fp32
activations, fp32, bf16 or int8 weights, and fp32 or bf16 caches, contiguous.
"""

import ctypes
import functools
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
MAX_ROWS = 8

embed = eager.embed


def linear(
    out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, norm: Norm | None = None,
    residual: Tensor | None = None, approximate: str | None = None,
) -> None:  # fmt: skip
    values, scales = (weight, None) if isinstance(weight, Tensor) else weight
    norm_weight, norm_bias = norm or (None, None)
    tensors = map(_address, (x, values, scales, bias, norm_weight, norm_bias, residual, out))
    sizes = len(x), *values.shape, torch.get_num_threads()
    _functions("linear")[values.dtype](*tensors, *sizes)
    if approximate is not None:  # PyTorch's is in vectors, C's erff is not
        torch.ops.aten.gelu_(out, approximate=approximate)


def attend_project(
    out: Tensor, qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, longest: int,
    weight: Weight, bias: Tensor | None,
) -> None:  # fmt: skip
    y = torch.empty_like(out)
    tensors = map(_address, (qkv, keys, values, positions, y))
    _functions("attend")[keys.dtype](*tensors, len(qkv), *keys.shape, torch.get_num_threads())
    linear(out, y, weight, bias, residual=out)


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
    pointers, sizes, words = (8, 4, _WEIGHTS) if name == "linear" else (5, 6, _CACHES)
    by_dtype = {dtype: getattr(library(_SOURCE), f"{name}_{word}") for dtype, word in words.items()}
    for function in by_dtype.values():
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int] * sizes
        function.restype = None
    return by_dtype
