"""The second half of `fastgpt tune`: which implementation of each op is fastest here.

Forward and backward are timed together, against the choice where nobody measured (backend.py). The
transformer block is timed as a whole, fused or module by module, outside torch.compile and inside:
how fast its parts are alone does not decide that.
"""

import contextlib
import functools
import io
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig, backend, examples, ops, reference, use_backend
from fastgpt.commands.launch_search import MARGIN, distance
from fastgpt.commands.searches import Sizes
from fastgpt.commands.timing import Variants, in_turns
from fastgpt.devices import autocast
from fastgpt.examples import example, outline
from fastgpt.fused.launchers import FUSABLE

WHOLE = ("block", "compiled")  # ops that are made of others


def race(device: torch.device, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
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
    """Forward and backward of a GPT with one block and 64 tokens, compiled for op "compiled".

    The block is fused, or run module by module; each way uses the parts that were fastest in
    `races` and that it can be made of.
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
    """The choice where nobody measured, unless it could not run or another is faster by MARGIN."""
    best, usual = min(times, key=times.__getitem__), backend.OPS[op].unmeasured
    beaten = usual not in times or times[usual] > MARGIN * times[best]
    return best if beaten else usual


def _fastest_parts(times: dict[str, dict[str, float]], fused: bool) -> dict[str, str]:
    """The fastest implementation of every op not in WHOLE; `fused`: that a fused block can use."""
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


def winners(rows: list[dict[str, Any]]) -> dict[str, str]:
    """op -> the implementation to use.

    Parts that a fused block cannot use are chosen only where the fused block as a whole lost.
    """
    times = _times(rows)
    whole = {op: fastest(op, times[op]) for op in WHOLE if op in times}
    return _fastest_parts(times, fused=whole.get("block") != "torch") | whole
