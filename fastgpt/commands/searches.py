"""What `fastgpt tune` searches: the kernels of a model of given sizes, and for each the launch
configurations worth a try.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Config = dict[str, int]
LAYERS = 8  # that a decoding kernel is timed over: one launch takes only microseconds
ROWS = 8  # texts in a batch to decode


class Sizes(NamedTuple):
    """Of the model to tune for: M tokens of width C, heads of D, vocabulary V."""

    M: int = 16384
    C: int = 768
    D: int = 64
    V: int = 50304
    dtype: torch.dtype = torch.bfloat16


class Search(NamedTuple):
    key: str  # under which _tuned.configured looks the configuration up
    call: Callable[[], Any]  # launches the kernel
    candidates: list[Any]
    # what the kernel computes, where a second `call` would give something else
    result: Callable[[], Any] | None = None


def searches(device: torch.device, sizes: Sizes) -> Iterator[Search]:
    """The kernels with most time to win first, as the last ones may be cut off."""
    yield from _in_training(device, sizes)
    yield from _in_decoding(device, sizes)


def _in_training(device: torch.device, sizes: Sizes) -> Iterator[Search]:
    from fastgpt.kernels import attention, cross_entropy, gemm_gelu, gemm_tma, layer_norm
    from fastgpt.kernels._launch import power_of_2

    M, C, D, V, dtype = sizes
    name = str(dtype).removeprefix("torch.")

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    T = min(M, 1024)
    qkv = rand(M // T, T, 3 * C)
    y, lse = attention.packed_forward(qkv, C // D, None, 0.0)
    call: Callable[[], Any]
    call = functools.partial(attention.packed_backward, y, qkv, y, lse, None, C // D, 0.0)
    yield Search(f"attention_backward {D} {name}", call, _backward_tiles(D))
    block = dict(BLOCK_D=(max(16, power_of_2(D)),))
    tiles = _grid(
        BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), **block, num_warps=(4, 8), num_stages=(2, 3, 4)
    )
    call = functools.partial(attention.packed_forward, qkv, C // D, None, 0.0)
    tiles = [t for t in tiles if t["BLOCK_M"] >= t["BLOCK_N"]]
    yield Search(f"attention_forward {D} {name}", call, tiles)
    x, wide, h = rand(M, C), rand(4 * C, C), rand(M, 4 * C)
    tma = gemm_tma.takes(x, wide)
    tiles = _grid(
        BLOCK_M=(64, 128), BLOCK_N=(128, 256), BLOCK_K=(64,), GROUP_M=(8,), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip
    call = functools.partial(gemm_gelu.forward, x, wide, rand(4 * C), False)
    halves = [dict(tile, PARTS=2, SPECIALIZED=False) for tile in tiles]
    if not tma:
        yield Search(f"gemm_gelu {name}", call, tiles)
    else:
        yield Search("gemm_tma_fc", call, halves)
        call = functools.partial(gemm_tma.dgrad, x, rand(C, 4 * C), h, False, True, True)
        fit = [t for t in tiles if t["BLOCK_M"] * t["BLOCK_N"] <= 2048 * t["num_warps"]]
        yield Search("gemm_tma_dgrad", call, fit)  # larger ones spill by the hundred
    x, w, block = rand(M, C), rand(C), dict(BLOCK_N=(max(16, 1 << (C - 1).bit_length()),))
    tiles = _grid(BLOCK_M=(1, 2, 4, 8), **block, num_warps=(1, 2, 4, 8))
    _, s, mean, rstd = layer_norm.add_forward(x, x, w, w, 1e-5, dtype)
    call = functools.partial(layer_norm.add_forward, x, x, w, w, 1e-5, dtype)
    yield Search(f"layer_norm_forward {C}", call, tiles)
    call = functools.partial(layer_norm.backward, x, x, s, w, mean, rstd, True, dtype)
    tiles = _grid(BLOCK_M=(1, 2, 4), **block, STAGES=(1, 2), num_warps=(1, 2, 4, 8))
    yield Search(f"layer_norm_backward {C}", call, tiles)
    logits, ids = rand(M, V), torch.randint(V, (M,), device=device)
    leaf = logits.clone().requires_grad_()
    blocks = _grid(BLOCK=(1024, 2048, 4096, 8192, 16384), num_warps=(4, 8, 16, 32))
    tiles = _grid(BLOCK_M=(1,), BLOCK_V=(1024, 2048, 4096, 8192, 16384), num_warps=(4, 8, 16, 32))
    factor = torch.ones((), device=device)

    def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy.cross_entropy_(x, ids, -1, factor), x

    def both_ways() -> tuple[Tensor, ...]:
        loss = cross_entropy.cross_entropy(leaf, ids)
        return loss, *torch.autograd.grad(loss, leaf)

    call = functools.partial(in_place, logits.clone())
    yield Search(f"cross_entropy_ {V}", call, blocks, lambda: in_place(logits.clone()))
    yield Search(f"cross_entropy {V}", both_ways, tiles)


def _in_decoding(device: torch.device, sizes: Sizes) -> Iterator[Search]:
    """A step's kernels, for one text and for ROWS."""
    from fastgpt.kernels import decode, decode_linear
    from fastgpt.kernels._launch import power_of_2

    _, C, D, V, dtype = sizes
    name = str(dtype).removeprefix("torch.")

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def linears(M: int, N: int, K: int) -> Callable[[], Tensor]:
        x = rand(M, K)
        weights = [rand(N, K, dtype=dtype) for _ in range(LAYERS if N < V else 1)]

        def call() -> Tensor:
            out = torch.empty(M, N, device=device)
            for weight in weights:
                decode_linear.linear(out, x, weight, None)
            return out

        return call

    def cache(R: int, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (rand(R, C // D, bucket, D, dtype=dtype) for _ in range(2))
        return keys, values, torch.full((R,), bucket - 1, dtype=torch.int32, device=device)

    def attends(R: int, bucket: int) -> Callable[[], Tensor]:
        caches = [cache(R, bucket) for _ in range(LAYERS)]
        qkv, weight = rand(R, 3 * C), rand(C, C, dtype=dtype)

        def call() -> Tensor:
            out = torch.zeros(R, C, device=device)
            for keys, values, positions in caches:
                decode.attend_project(out, qkv, keys, values, positions, bucket, weight, None)
            return out

        return call

    shapes = (3 * C, C), (4 * C, C), (C, 4 * C), (V, C)
    for N, K in shapes:
        yield Search(f"decode_row {N} {K} {name}", linears(1, N, K), _row_tiles(power_of_2(K)))
    chunked = _grid(CHUNK=(16, 32, 64, 128), num_warps=(1, 2, 4, 8))
    yield Search(f"decode_attend {D} 1", attends(1, 512), chunked)
    width = power_of_2(C // D) * power_of_2(D)
    blocks = _grid(BLOCK_N=(1, 2, 4), num_warps=(1, 2, 4, 8, 16))
    for bucket in (256, 512, 1024):
        chunks = decode.attend(rand(1, 3 * C), *cache(1, bucket), bucket)[0].shape[2]
        yield Search(f"decode_project {C} {width} {chunks}", attends(1, bucket), blocks)
    tiles = _grid(
        BLOCK_M=(16,), BLOCK_N=(16, 32, 64), BLOCK_K=(32, 64, 128), SPLIT=(2, 4), num_stages=(2, 3)
    )
    tiles = [dict(tile, num_warps=tile["SPLIT"]) for tile in tiles]
    for N, K in shapes if decode_linear.most_rows(dtype) >= ROWS else ():
        yield Search(f"decode_rows {ROWS} {N} {K} {name}", linears(ROWS, N, K), tiles)
    yield Search(f"decode_attend {D} {ROWS}", attends(ROWS, 512), chunked)


def _grid(**choices: tuple[int, ...]) -> list[Config]:
    return [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]


def _backward_tiles(D: int) -> list[tuple[Config, Config]]:
    """One tile for dk and dv, and the same one transposed for dq."""
    pairs = []
    block = max(16, 1 << (D - 1).bit_length())
    for tile in _grid(wide=(64, 128), narrow=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)):
        wide, narrow = tile.pop("wide"), tile.pop("narrow")
        if wide >= narrow:
            tile["BLOCK_D"] = block
            pairs.append((
                dict(BLOCK_M=narrow, BLOCK_N=wide, **tile),
                dict(BLOCK_M=wide, BLOCK_N=narrow, **tile),
            ))  # fmt: skip
    return pairs


def _row_tiles(block_k: int) -> list[Config]:
    """Of which a thread holds 16 to 256 numbers, or nearly."""
    tiles = _grid(BLOCK_N=(1, 2, 4, 8, 16), BLOCK_K=(block_k,), num_warps=(1, 2, 4, 8, 16))
    held = [tile["BLOCK_N"] * tile["BLOCK_K"] // (32 * tile["num_warps"]) for tile in tiles]
    return [tile for tile, numbers in zip(tiles, held, strict=True) if 16 <= numbers <= 256]
