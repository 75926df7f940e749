"""The first half of `fastgpt tune`: which launch configuration of each kernel is fastest here.

Every candidate is called in turns with today's configuration. One that gives another result, or
cannot run, is left out, and one that is faster by less than MARGIN changes nothing.
"""

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.commands.searches import Search, Sizes, searches
from fastgpt.commands.timing import Variants, in_turns
from fastgpt.kernels import _tuned
from fastgpt.storage.printable import first_line

MARGIN = 1.02  # a winner must be this many times as fast: less is noise


def search(
    device: torch.device, sizes: Sizes, seconds: float, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row per candidate, the fastest of a kernel first. `only` names kernels; none means all.

    over_today is how many times as fast as today's configuration it is. Compiling takes longer
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
        rows += sorted(tried, key=lambda row: -row.get("over_today", 0.0))
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
    return row | {"microseconds": 1e6 * candidate, "over_today": today / candidate}


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
        if row.get("over_today", 0.0) > MARGIN:
            configs.setdefault(row["kernel"], row["config"])
    return configs
