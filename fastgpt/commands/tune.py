"""`fastgpt tune`: measure this device once, so that dispatch and launches follow the measurement.

Two searches: which launch configuration of every kernel, against today's; and which implementation
of every op, forward and backward together, against the choice where nobody measured (backend.py). A
candidate that computes something else, or cannot run, is no candidate, and one that is faster by
less than MARGIN changes nothing. The transformer block is raced as a whole, outside torch.compile
and inside: fused, or module by module. Its parts on their own do not decide that.

What wins is written to the user's cache folder (kernels/_tuned.py), where every process of the
machine reads it.
"""

import argparse
import contextlib
import datetime
import functools
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, backend, examples, ops, reference, use_backend
from fastgpt.commands.options import number
from fastgpt.devices import autocast
from fastgpt.examples import example, outline
from fastgpt.fused.launchers import FUSABLE
from fastgpt.kernels import _tuned
from fastgpt.storage import files
from fastgpt.timing import Variants, in_turns

Config = dict[str, int]
MARGIN = 1.02  # what a winner must be faster by: less is noise
WHOLE = ("block", "compiled")  # ops that are made of others


class Sizes(NamedTuple):
    """Of the model to tune for: M tokens of width C, heads of D, vocabulary V."""

    M: int = 16384
    C: int = 768
    D: int = 64
    V: int = 50304
    dtype: torch.dtype = torch.bfloat16


class Search(NamedTuple):
    key: str  # as _tuned.configured is asked for it
    call: Callable[[], Any]  # launches the kernel
    candidates: list[Any]
    # what the kernel computes, for one that does not give the same when it is called again
    result: Callable[[], Any] | None = None


def searches(device: torch.device, sizes: Sizes) -> Iterator[Search]:
    """Most valuable first: attention backward is the largest gap to its floor."""
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
    """Pairs for dk/dv and for dq: the tile of one is the other's, transposed."""
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
    """A row per candidate, fastest first within a kernel; over_default 1 is what runs today. `only`
    names kernels, all by default.

    Compiling takes longer than measuring: a search whose share of the time is over leaves the rest
    of its candidates out.
    """
    end, found = time.perf_counter() + seconds, list(searches(device, sizes))
    if unknown := set(only) - {_kernel(one) for one in found}:
        known = ", ".join(dict.fromkeys(map(_kernel, found)))
        raise ValueError(f"--only {' '.join(sorted(unknown))}: there is {known}")
    found = [one for one in found if not only or _kernel(one) in only]
    rows = []
    for i, one in enumerate(found):
        expected, now = (one.result or one.call)(), time.perf_counter()
        share = (end - now) / (len(found) - i)
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
        first_line = (str(problem).splitlines() or [""])[0]
        return row | {"problem": f"{type(problem).__name__}: {first_line[:100]}"}
    today, candidate = (statistics.median(times[name]) for name in calls)
    return row | {"microseconds": 1e6 * candidate, "over_default": today / candidate}


def _with(one: Search, config: Any) -> Any:
    with _tuned.trying(one.key, config):
        return one.call()


def distance(ours: Any, theirs: Any) -> float:
    """The largest |a - b| / |b| over the tensors of two results; NaN if any is."""
    pairs = zip(*([t] if isinstance(t, Tensor) else t for t in (ours, theirs)), strict=True)
    gaps = [(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs if a.numel()]
    return torch.stack(gaps).max().item() if gaps else 0.0


def implementations(device: torch.device, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """A row per op and implementation that runs here: the time of forward and backward."""
    raced = [op for op, entry in backend.OPS.items() if entry.public]
    share = seconds / (len(raced) + 2)
    rows = [row for op in raced for row in _race_op(op, device, sizes, share)]
    for whole in WHOLE:
        rows += _race_whole(whole, device, sizes, rows, share)
    return rows


def _race_op(op: str, device: torch.device, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    inputs, options, facts = example(op, _of_a_batch(sizes), device, sizes.dtype)
    tensors = tuple(t for t in inputs if t is not None)
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]

    def run(function: Callable[..., Any], implementation: str) -> list[Tensor]:
        with use_backend("auto", **{op: implementation}):
            out = function(*inputs, **options)
            outs = list(out) if isinstance(out, tuple) else [out]
            grads = [torch.ones_like(t) for t in outs]
            return [*outs, *torch.autograd.grad(outs, leaves, grads)]

    def why_not(implementation: str) -> str | None:
        return backend.why_not(op, implementation, tensors, facts)

    expected = run(getattr(reference, op), "torch")
    call = functools.partial(run, getattr(ops, op))
    return _race(op, call, why_not, expected, device, seconds)


def _of_a_batch(sizes: Sizes) -> examples.Sizes:
    T = min(sizes.M, 1024)
    return examples.Sizes(sizes.M // T, T, sizes.C, sizes.C // sizes.D, sizes.V)


def _race_whole(
    op: str, device: torch.device, sizes: Sizes, races: list[dict[str, Any]], seconds: float
) -> list[dict[str, Any]]:
    """A training step's block, fused or module by module, each of the fastest parts for it; as it
    is, or inside torch.compile. It is a model's only block, between an embedding and a head of 64
    tokens.
    """
    B, T, C, H, _ = _of_a_batch(sizes)
    with contextlib.redirect_stdout(io.StringIO()), device:
        model = GPT(GPTConfig(T, 64, 1, H, C, bias=False, return_logits=False))
    idx, parameters = torch.randint(64, (B, T), device=device), list(model.parameters())
    (qkv,), _, facts = outline(op, _of_a_batch(sizes), device, sizes.dtype)
    assert qkv is not None
    times = _times(races)

    def backend_of(implementation: str) -> use_backend:
        if implementation == "torch" and op == "compiled":
            return use_backend("auto", compiled="torch")  # the compiler's own ops
        fused = implementation != "torch"
        parts = _fastest_parts(times, fused)
        if fused:
            parts = {part: name for part, name in parts.items() if part in FUSABLE}
        return use_backend("auto", **parts, **{op: implementation})

    def step(forward: Any) -> list[Tensor]:
        with autocast(device, sizes.dtype):
            _, loss = forward(idx, idx)
        return [loss, *torch.autograd.grad(loss, parameters)]

    forward = torch.compile(model) if op == "compiled" else model

    def run(implementation: str) -> list[Tensor]:
        with backend_of(implementation):
            return step(forward)

    def why_not(implementation: str) -> str | None:
        with backend_of(implementation):
            running, reason = backend.explain(op, (qkv,), facts)
        return None if running == implementation else reason

    with use_backend("torch"):
        expected = step(model)
    return _race(op, run, why_not, expected, device, seconds)


def _race(
    op: str,
    run: Callable[[str], list[Tensor]],
    why_not: Callable[[str], str | None],
    expected: list[Tensor],
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row per implementation that `run` is called with: its time, or why it has none."""
    variants: Variants = {}
    rows: list[dict[str, Any]] = []
    for name in ("torch", *backend.OPS[op].implementations):
        try:
            if name != "torch" and (problem := why_not(name)):
                raise RuntimeError(problem)
            if not (error := distance(run(name), expected)) < 0.03:
                raise ArithmeticError(f"{error:.2g} away from PyTorch's result")
            variants[name] = functools.partial(run, name)
        except Exception as problem:
            rows.append({"op": op, "variant": name, "problem": str(problem)[:100]})
    for name, samples in in_turns(variants, device, seconds).items():
        rows.append({"op": op, "variant": name, "microseconds": 1e6 * statistics.median(samples)})
    return rows


def _times(races: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """op -> implementation -> microseconds, of those that have a time."""
    times: dict[str, dict[str, float]] = {}
    for row in races:
        if "microseconds" in row:
            times.setdefault(row["op"], {})[row["variant"]] = row["microseconds"]
    return times


def fastest(op: str, times: dict[str, float]) -> str:
    """The choice where nobody measured, unless it has no time or another is faster by MARGIN."""
    best, usual = min(times, key=times.__getitem__), backend.OPS[op].unmeasured
    beaten = usual not in times or times[usual] > MARGIN * times[best]
    return best if beaten else usual


def _fastest_parts(times: dict[str, dict[str, float]], fused: bool) -> dict[str, str]:
    """The fastest implementation of every op not in WHOLE, from which a fused one can be made."""
    parts = {}
    for op, raced in times.items():
        usable = {
            name: seconds
            for name, seconds in raced.items()
            if not fused or name in FUSABLE.get(op, raced)
        }
        if op not in WHOLE and usable:
            parts[op] = fastest(op, usable)
    return parts


def choose(races: list[dict[str, Any]], searched: list[dict[str, Any]]) -> dict[str, Any]:
    """What won by more than noise, as _tuned.entry reads it.

    Only where the fused block as a whole lost may its parts be what it cannot be made of.
    """
    times = _times(races)
    whole = {op: fastest(op, times[op]) for op in WHOLE if op in times}
    implementations = _fastest_parts(times, fused=whole.get("block") != "torch") | whole
    configs: dict[str, Any] = {}
    for row in searched:  # the fastest of a kernel comes first
        if row.get("over_default", 0.0) > MARGIN:
            configs.setdefault(row["kernel"], row["config"])
    return {
        "date": datetime.date.today().isoformat(),
        "implementations": implementations,
        "configs": configs,
    }


def joined(kept: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """An entry of which a part was measured anew."""
    parts = ("implementations", "configs")
    return chosen | {part: {**kept.get(part, {}), **chosen[part]} for part in parts}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = number(int, 1, 2**31)
    parser.add_argument(
        "--seconds", type=number(float, 1), default=300, help="of measuring (%(default)g)"
    )
    parser.add_argument("--n-embd", type=size, default=768, help="model width (%(default)s)")
    parser.add_argument("--n-head", type=size, default=12, help="attention heads (%(default)s)")
    parser.add_argument("--vocab-size", type=size, default=50304, help="(%(default)s)")
    parser.add_argument("--tokens", type=size, default=16384, help="in a batch (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", default=[],
                        help="search these kernels' configurations, and race nothing")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise RuntimeError("fastgpt tune measures kernels on a CUDA GPU, and PyTorch sees none")
    if args.n_embd % args.n_head:
        raise ValueError(f"--n-embd {args.n_embd} is not divisible by --n-head {args.n_head}")
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    sizes = Sizes(args.tokens, args.n_embd, args.n_embd // args.n_head, args.vocab_size)
    path = _tuned.path(name)
    kept = _tuned.entry(name) if args.only else {}
    # configurations first: the race is between kernels as they will be launched
    searched = search(device, sizes, (1.0 if args.only else 0.7) * args.seconds, args.only)
    _write(path, joined(kept, choose([], searched)))
    races = [] if args.only else implementations(device, sizes, 0.3 * args.seconds)
    chosen = joined(kept, choose(races, searched))
    _write(path, chosen)
    for row in (*races, *searched):
        result = row.get("problem") or f"{row['microseconds']:.1f} us"
        print(f"{row.get('op') or row['kernel']:28} {row['variant']:12} {result}")
    print(f"\n{json.dumps(chosen, indent=1)}\nwritten to {path}; read at every start")
    return 0


def _write(path: Path, entry: dict[str, Any]) -> None:
    """In one step, so that no process reads half of it; and let this one read it anew."""
    files.write_bytes(path, (json.dumps(entry, indent=1) + "\n").encode())
    _tuned.forget()
