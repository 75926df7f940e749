"""Search the launch configurations of the kernels, each against the one that ships.

A candidate takes the place of a kernel file's `_config` for the time of its measurement. One that
does not compile, or computes something else, is a row that says so.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import in_turns

Config = dict[str, int]


class Target(NamedTuple):
    """A kernel file with the call that launches its kernel, and what to try."""

    name: str
    module: Any
    call: Callable[[], Any]
    candidates: list[Any]  # what `_config` may return


def _grid(**choices: tuple[int, ...]) -> list[Config]:
    return [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]


def targets(device: torch.device, dtype: torch.dtype, M: int, C: int, V: int) -> Iterator[Target]:
    """Most valuable first: attention backward is the largest gap, then the GEMM's epilogue."""
    from fastgpt.kernels import (
        attention,
        attention_backward,
        attention_forward,
        cross_entropy,
        gemm_gelu,
        layer_norm,
    )

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    T, D = min(M, 1024), 64
    qkv = rand(M // T, T, 3 * C)
    y, lse = attention.packed_forward(qkv, C // D, None, 0.0)
    tiles = [t for t in _grid(wide=(64, 128), narrow=(32, 64, 128), num_warps=(4, 8),
                              num_stages=(1, 2, 3)) if t["wide"] >= t["narrow"]]  # fmt: skip
    yield Target(
        "attention backward", attention_backward,
        functools.partial(attention.packed_backward, y, qkv, y, lse, None, C // D, 0.0),
        [_both_ways(tile, D) for tile in tiles],
    )  # fmt: skip
    yield Target(
        "attention forward", attention_forward,
        functools.partial(attention.packed_forward, qkv, C // D, None, 0.0),
        [c for c in _grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), BLOCK_D=(D,),
                          num_warps=(4, 8), num_stages=(2, 3, 4)) if c["BLOCK_M"] >= c["BLOCK_N"]],
    )  # fmt: skip
    yield Target(
        "gemm + gelu", gemm_gelu,
        functools.partial(gemm_gelu.forward, rand(M, C), rand(4 * C, C), rand(4 * C), False),
        _grid(BLOCK_M=(64, 128), BLOCK_N=(128, 256), BLOCK_K=(64,), GROUP_M=(8,), num_warps=(4, 8),
              num_stages=(3, 4)),
    )  # fmt: skip
    x, w = rand(M, C), rand(C)
    _, s, mean, rstd = layer_norm.add_forward(x, x, w, w, 1e-5, dtype)
    norms = _grid(
        BLOCK_M=(1, 2, 4, 8), BLOCK_N=(1 << (C - 1).bit_length(),), num_warps=(1, 2, 4, 8)
    )
    call = functools.partial(layer_norm.add_forward, x, x, w, w, 1e-5, dtype)
    yield Target("add + norm forward", layer_norm, call, norms)
    call = functools.partial(layer_norm.backward, x, x, s, w, mean, rstd, True, dtype)
    yield Target("add + norm backward", layer_norm, call, norms)
    logits, picks = rand(M, V), torch.randint(V, (M,), device=device)
    losses = _grid(BLOCK_M=(1,), BLOCK_V=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))
    call = functools.partial(cross_entropy.forward, logits, picks, -1)
    yield Target("cross entropy forward", cross_entropy, call, losses)


def _both_ways(tile: Config, D: int) -> tuple[Config, Config]:
    """The pair that attention_backward._config returns: for dk/dv, and for dq."""
    rest = dict(BLOCK_D=D, num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    wide, narrow = tile["wide"], tile["narrow"]
    return dict(BLOCK_M=narrow, BLOCK_N=wide, **rest), dict(BLOCK_M=wide, BLOCK_N=narrow, **rest)


@contextmanager
def _configured(module: Any, config: Any) -> Iterator[None]:
    shipped = module._config
    module._config = lambda *_: config
    try:
        yield
    finally:
        module._config = shipped


def search(
    device: torch.device, dtype: torch.dtype, M: int, C: int, V: int, seconds: float
) -> list[dict[str, Any]]:
    """A row per candidate, fastest first within a kernel; the shipped configuration is 1.0."""
    found = list(targets(device, dtype, M, C, V))
    rows = []
    for target in found:
        expected = target.call()
        share = seconds / len(found) / max(len(target.candidates), 1)
        results = [_try(target, config, expected, device, share) for config in target.candidates]
        rows += sorted(results, key=lambda row: -row.get("over_default", 0.0))
    return rows


def _try(
    target: Target, config: Any, expected: Any, device: torch.device, seconds: float
) -> dict[str, Any]:
    row = {"kernel": target.name, "variant": str(config), "config": config}
    try:
        with _configured(target.module, config):
            error = _distance(target.call(), expected)
        if not error < 0.01:
            raise ArithmeticError(f"{error:.2g} away from the shipped configuration")
        calls = {"default": target.call, "candidate": _in(target, config)}
        times = in_turns(calls, device, seconds)
    except Exception as problem:  # out of shared memory, a compiler's refusal, a wrong result
        return row | {
            "problem": f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"
        }
    default, candidate = (statistics.median(times[name]) for name in calls)
    return row | {"microseconds": 1e6 * candidate, "over_default": default / candidate}


def _in(target: Target, config: Any) -> Callable[[], Any]:
    def call() -> Any:
        with _configured(target.module, config):
            return target.call()

    return call


def _distance(ours: Any, theirs: Any) -> float:
    """The largest |a - b| / |b| over the tensors of two results; NaN if any is."""
    pairs = zip(*([t] if isinstance(t, Tensor) else t for t in (ours, theirs)), strict=True)
    gaps = [(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs if a.numel()]
    return torch.stack(gaps).max().item() if gaps else 0.0
