"""The first half of `fastgpt tune`: which launch configuration of each kernel is fastest here.

Every candidate is called in turns with today's configuration. One that gives another result, or
cannot run, is left out, and one that is faster by less than MARGIN changes nothing.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.kernels import _tuned
from fastgpt.storage.printable import first_line
from fastgpt.timing import Variants, in_turns

Config = dict[str, int]
MARGIN = 1.02  # a winner must be this many times as fast: less is noise


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
    from fastgpt.kernels import attention, cross_entropy, gemm_gelu, gemm_tma, layer_norm

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
    block = dict(BLOCK_D=(max(16, 1 << (D - 1).bit_length()),))
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


def search(
    device: torch.device, sizes: Sizes, seconds: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row per candidate, the fastest of a kernel first. `only` names kernels; none means all.

    over_default is how many times as fast as today's configuration it is. Compiling takes longer
    than measuring: when a kernel's share of the seconds is used up, its other candidates are left
    out.
    """
    end, wanted = time.perf_counter() + seconds, list(searches(device, sizes))
    if unknown := set(only) - {_kernel(one) for one in wanted}:
        known = ", ".join(dict.fromkeys(map(_kernel, wanted)))
        raise ValueError(f"--only {' '.join(sorted(unknown))}: unknown kernel; use some of {known}")
    wanted = [one for one in wanted if not only or _kernel(one) in only]
    rows = []
    for i, one in enumerate(wanted):
        expected, now = (one.result or one.call)(), time.perf_counter()
        share = (end - now) / (len(wanted) - i)
        tried = []
        for config in one.candidates:
            if time.perf_counter() > now + share:
                break
            tried.append(_try(one, config, expected, device, 0.3 * share / len(one.candidates)))
        rows += sorted(tried, key=lambda row: -row.get("over_default", 0.0))
    return rows


def _kernel(one: Search) -> str:
    return one.key.split(" ")[0]


def _try(
    one: Search, config: Any, expected: Any, device: torch.device, seconds: float
) -> dict[str, Any]:
    row = {"kernel": one.key, "variant": str(config), "config": config}
    try:
        with _tuned.trying(one.key, config):
            error = distance((one.result or one.call)(), expected)
        if not error < 0.01:
            raise ArithmeticError(f"{error:.2g} away from the result of today's configuration")
        calls: Variants = {"today": one.call, "candidate": functools.partial(_with, one, config)}
        times = in_turns(calls, device, seconds)
    except Exception as problem:  # out of shared memory, a compiler's refusal, a wrong result
        return row | {"problem": f"{type(problem).__name__}: {first_line(problem):.100}"}
    today, candidate = (statistics.median(times[name]) for name in calls)
    return row | {"microseconds": 1e6 * candidate, "over_default": today / candidate}


def _with(one: Search, config: Any) -> Any:
    with _tuned.trying(one.key, config):
        return one.call()


def distance(result: Any, expected: Any) -> float:
    """The largest |a - b| / |b| of two results' tensors; NaN if one of them is."""
    pairs = zip(*([t] if isinstance(t, Tensor) else t for t in (result, expected)), strict=True)
    gaps = [(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs if a.numel()]
    return torch.stack(gaps).max().item() if gaps else 0.0


def winners(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """kernel -> the configuration that beat today's."""
    configs: dict[str, Any] = {}
    for row in rows:  # the fastest of a kernel comes first
        if row.get("over_default", 0.0) > MARGIN:
            configs.setdefault(row["kernel"], row["config"])
    return configs
