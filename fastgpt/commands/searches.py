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
Rand = Callable[..., Tensor]  # of a shape, in the model's dtype or another
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
    for of_some in (_attention, _gemms, _layer_norm, _loss, _in_decoding):
        yield from of_some(sizes, functools.partial(_rand, device, sizes.dtype))


def _rand(device: torch.device, own: torch.dtype, *shape: int, dtype: Any = None) -> Tensor:
    return torch.randn(shape, device=device).to(dtype or own)


def _attention(sizes: Sizes, rand: Rand) -> Iterator[Search]:
    from fastgpt.kernels import attention

    M, C, D, _, dtype = sizes
    T, H = min(M, 1024), C // D
    qkv = rand(M // T, T, 3 * C)
    y, lse = attention.packed_forward(qkv, H, None, 0.0)
    backward = functools.partial(attention.packed_backward, y, qkv, y, lse, None, H, 0.0)
    yield Search(f"attention_backward {D} {_name(dtype)}", backward, _backward_tiles(D))
    tiles = _grid(
        BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), BLOCK_D=(_block(D),), num_warps=(4, 8),
        num_stages=(2, 3, 4),
    )  # fmt: skip
    forward = functools.partial(attention.packed_forward, qkv, H, None, 0.0)
    tiles = [tile for tile in tiles if tile["BLOCK_M"] >= tile["BLOCK_N"]]
    yield Search(f"attention_forward {D} {_name(dtype)}", forward, tiles)


def _gemms(sizes: Sizes, rand: Rand) -> Iterator[Search]:
    from fastgpt.kernels import gemm_gelu, gemm_tma

    M, C, _, _, dtype = sizes
    x, fc = rand(M, C), rand(4 * C, C)
    tiles = _grid(
        BLOCK_M=(64, 128), BLOCK_N=(128, 256), BLOCK_K=(64,), GROUP_M=(8,), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip
    forward = functools.partial(gemm_gelu.forward, x, fc, rand(4 * C), False)
    if not gemm_tma.takes(x, fc):
        yield Search(f"gemm_gelu {_name(dtype)}", forward, tiles)
        return
    halves = [dict(tile, PARTS=2, SPECIALIZED=False) for tile in tiles]
    yield Search("gemm_tma_fc", forward, halves)
    h, proj = rand(M, 4 * C), rand(C, 4 * C)
    dgrad = functools.partial(gemm_tma.dgrad, x, proj, h, False, True, True)
    fit = [t for t in tiles if t["BLOCK_M"] * t["BLOCK_N"] <= 2048 * t["num_warps"]]
    yield Search("gemm_tma_dgrad", dgrad, fit)  # larger ones spill by the hundred


def _layer_norm(sizes: Sizes, rand: Rand) -> Iterator[Search]:
    from fastgpt.kernels import layer_norm

    M, C, _, _, dtype = sizes
    x, w, block = rand(M, C), rand(C), dict(BLOCK_N=(_block(C),))
    forward = functools.partial(layer_norm.add_forward, x, x, w, w, 1e-5, dtype)
    tiles = _grid(BLOCK_M=(1, 2, 4, 8), **block, num_warps=(1, 2, 4, 8))
    yield Search(f"layer_norm_forward {C}", forward, tiles)
    _, s, mean, rstd = forward()
    backward = functools.partial(layer_norm.backward, x, x, s, w, mean, rstd, True, dtype)
    tiles = _grid(BLOCK_M=(1, 2, 4), **block, STAGES=(1, 2), num_warps=(1, 2, 4, 8))
    yield Search(f"layer_norm_backward {C}", backward, tiles)


def _loss(sizes: Sizes, rand: Rand) -> Iterator[Search]:
    from fastgpt.kernels import cross_entropy

    M, V = sizes.M, sizes.V
    logits = rand(M, V)
    ids = torch.randint(V, (M,), device=logits.device)
    factor = torch.ones((), device=logits.device)
    leaf = logits.clone().requires_grad_()

    def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy.cross_entropy_(x, ids, -1, factor), x

    def both_ways() -> tuple[Tensor, ...]:
        loss = cross_entropy.cross_entropy(leaf, ids)
        return loss, *torch.autograd.grad(loss, leaf)

    sizes_of_blocks = (1024, 2048, 4096, 8192, 16384)
    again = functools.partial(in_place, logits.clone())
    tiles = _grid(BLOCK=sizes_of_blocks, num_warps=(4, 8, 16, 32))
    yield Search(f"cross_entropy_ {V}", again, tiles, lambda: in_place(logits.clone()))
    tiles = _grid(BLOCK_M=(1,), BLOCK_V=sizes_of_blocks, num_warps=(4, 8, 16, 32))
    yield Search(f"cross_entropy {V}", both_ways, tiles)


def _in_decoding(sizes: Sizes, rand: Rand) -> Iterator[Search]:
    """A step's kernels, for one text and for ROWS; all but weights and caches are fp32."""
    from fastgpt.kernels import decode, decode_linear
    from fastgpt.kernels._launch import power_of_2

    _, C, D, V, dtype = sizes
    wide = functools.partial(rand, dtype=torch.float32)

    def linears(M: int, N: int, K: int) -> Callable[[], Tensor]:
        x = wide(M, K)
        weights = [rand(N, K) for _ in range(LAYERS if N < V else 1)]

        def call() -> Tensor:
            out = torch.empty(M, N, device=x.device)
            for weight in weights:
                decode_linear.linear(out, x, weight, None)
            return out

        return call

    def cache(R: int, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (rand(R, C // D, bucket, D) for _ in range(2))
        return keys, values, torch.full((R,), bucket - 1, dtype=torch.int32, device=keys.device)

    def attends(R: int, bucket: int) -> Callable[[], Tensor]:
        caches = [cache(R, bucket) for _ in range(LAYERS)]
        qkv, weight = wide(R, 3 * C), rand(C, C)

        def call() -> Tensor:
            out = torch.zeros(R, C, device=qkv.device)
            for keys, values, positions in caches:
                decode.attend_project(out, qkv, keys, values, positions, bucket, weight, None)
            return out

        return call

    shapes = (3 * C, C), (4 * C, C), (C, 4 * C), (V, C)
    for N, K in shapes:
        yield Search(
            f"decode_row {N} {K} {_name(dtype)}", linears(1, N, K), _row_tiles(power_of_2(K))
        )
    chunked = _grid(CHUNK=(16, 32, 64, 128), num_warps=(1, 2, 4, 8))
    yield Search(f"decode_attend {D} 1", attends(1, 512), chunked)
    width = power_of_2(C // D) * power_of_2(D)
    blocks = _grid(BLOCK_N=(1, 2, 4), num_warps=(1, 2, 4, 8, 16))
    chunk = 1024 // decode.attend(wide(1, 3 * C), *cache(1, 1024), 1024)[0].shape[2]
    for chunks in (2, 4, 8, 16):  # whatever their size will be
        yield Search(f"decode_project {C} {width} {chunks}", attends(1, chunks * chunk), blocks)
    tiles = _grid(
        BLOCK_M=(16,), BLOCK_N=(16, 32, 64), BLOCK_K=(32, 64, 128), SPLIT=(2, 4), num_stages=(2, 3)
    )
    tiles = [dict(tile, num_warps=tile["SPLIT"]) for tile in tiles]
    for N, K in shapes if decode_linear.most_rows(dtype) >= ROWS else ():
        yield Search(f"decode_rows {ROWS} {N} {K} {_name(dtype)}", linears(ROWS, N, K), tiles)
    yield Search(f"decode_attend {D} {ROWS}", attends(ROWS, 512), chunked)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _block(n: int) -> int:
    """Of a kernel that holds n numbers at once."""
    from fastgpt.kernels._launch import power_of_2

    return max(16, power_of_2(n))


def _grid(**choices: tuple[int, ...]) -> list[Config]:
    return [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]


def _backward_tiles(D: int) -> list[tuple[Config, Config]]:
    """One tile for dk and dv, and the same one transposed for dq."""
    pairs = []
    for tile in _grid(wide=(64, 128), narrow=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)):
        wide, narrow = tile.pop("wide"), tile.pop("narrow")
        if wide >= narrow:
            tile["BLOCK_D"] = _block(D)
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
