"""The ops of a GPT, both ways, against everything else that computes them.

For each case (harness/op_cases.py) `measure` checks what each peer (peers/ops.py) computes, gives
the wrong ones no time, and times the others in turns:

    forward     as in training: with a graph, keeping what the backward needs
    backward    of that graph, to every floating input
    both        for the losses, where some peers compute the gradients in the forward

`of_ceiling` is the time that the device's measured ceilings allow over the time taken.
`python -m bench.ops` writes a record. `make bench-ops` times the same calls with pytest-benchmark.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import machine, nvidia_smi, record, roofline
from bench.harness.op_cases import Case, cases
from bench.harness.roofline import Ceilings, Work
from bench.peers.ops import Peer, peers
from fastgpt import devices, reference
from fastgpt.commands.timing import Variants, in_turns

Row = dict[str, Any]
SAMPLES = 50  # kept of each variant
OPS = [case.op for case in cases(torch.device("cpu"), torch.float32, 64, 64, 64)]


class Checked:
    """The peers of a case. Each gives its calls only after its result was checked."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.inputs = [_leaf(t, t.dtype) for t in case.inputs()]
        self.truth, self.grads = _truth(case, self.inputs)
        self.eager_errors: list[tuple[float, float]] = []

    def calls(self, name: str) -> Variants:
        """direction -> call. ArithmeticError if it computes something else; what the peer raises
        where it cannot run; what eager, the yardstick, raises where it cannot."""
        if name != "eager" and not self.eager_errors:
            self.calls("eager")
        peer = peers(self.case.op)[name]
        results, timed = _prepare(self.case, peer, self.inputs, self.grads)
        errors = [_errors(a, b) for a, b in zip(results, self.truth, strict=True)]
        self.eager_errors = self.eager_errors or errors
        _refuse_wrong(errors, self.eager_errors, self.truth, self.inputs[0].dtype)
        return {way: call for way, call in timed.items() if way in self.case.work}


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    ceilings: Ceilings | None = None,
    variants: Sequence[str] | None = None,
) -> list[Row]:
    """A row per variant and direction; one that fails or computes something else says so."""
    checked, of_case = Checked(case), {"op": case.op, "shape": case.shape}
    rows: list[Row] = []
    calls: dict[str, Variants] = {direction: {} for direction in case.work}
    for name in peers(case.op):
        if name != "eager" and variants is not None and name not in variants:
            continue
        try:
            for direction, call in checked.calls(name).items():
                calls[direction][name] = call
        except Exception as problem:  # not installed, out of memory, a wrong result
            text = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
            rows.append({**of_case, "variant": name, "problem": text})
    del checked  # the truth takes memory
    for direction, right in calls.items():
        if "eager" not in right:
            continue
        times = in_turns(right, device, seconds / len(calls))
        rows += [
            {**of_case, "direction": direction, "variant": name}
            | _figures(samples, times["eager"], case.work[direction], ceilings)
            for name, samples in times.items()
        ]
    return rows


def _leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that wants a gradient, if it can have one."""
    return t.detach().clone().to(dtype).requires_grad_() if t.is_floating_point() else t


def _truth(case: Case, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and input gradients of eager in a wider dtype; the gradients of the outputs."""
    # float64 would take minutes and the whole memory for 16-bit inputs at real sizes
    wide = torch.float64 if inputs[0].dtype == torch.float32 else torch.float32
    leaves = [_leaf(t, wide) for t in inputs]
    outs = _outputs(getattr(reference, case.op), leaves, case.options)
    # a loss is differentiated as a loss: Liger and PyTorch's chunked one take a shortcut for 1
    grads = [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in outs]
    wanted = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad(outs, wanted, grads)
    return [t.detach() for t in (*outs, *gradients)], grads


def _prepare(
    case: Case, peer: Peer, shared: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], Variants]:
    """What the peer computes, outputs and gradients, and a call for each direction."""
    # Liger's cross entropy leaves gradients where its input was
    inputs = [_leaf(t, t.dtype) for t in shared] if peer.whole else shared
    wanted = [t for t in inputs if t.requires_grad]
    outs = _outputs(peer.call, inputs, case.options)
    out_grads = [g.to(out.dtype) for g, out in zip(grads, outs, strict=True)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_outputs(peer.call, inputs, case.options), wanted, out_grads)

    if peer.whole:
        return [*outs, *torch.autograd.grad(outs, wanted, out_grads)], {"both": both}
    forward = functools.partial(_outputs, peer.call, inputs, case.options)
    backward = functools.partial(torch.autograd.grad, outs, wanted, out_grads, retain_graph=True)
    return [*outs, *backward()], {"forward": forward, "backward": backward, "both": both}


def _outputs(function: Callable, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    out = function(*inputs, **options)
    return list(out) if isinstance(out, tuple) else [out]


def _errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, norm of all) |result - truth|; NaN stays NaN."""
    gap = result.detach().to(truth.dtype) - truth
    return gap.abs().max().item(), gap.norm().item()


def _refuse_wrong(
    errors: list[tuple[float, float]],
    eager: list[tuple[float, float]],
    truth: list[Tensor],
    dtype: torch.dtype,
) -> None:
    """ArithmeticError if a tensor is further from the truth than rounding in `dtype` explains.

    Allowed are 4 times eager's own largest error and 4 eps of the largest value, and for all
    elements together half of that: the one catches a wrong element, the other a wrong tile. For
    fp32 eps is 2^-15: PyTorch's own chunked linear_cross_entropy is 1e-5 away, by summation order.
    """
    eps = max(torch.finfo(dtype).eps, 2**-15)
    for i, ((worst, norm), (eager_worst, eager_norm), t) in enumerate(
        zip(errors, eager, truth, strict=True)
    ):
        if not worst <= 4 * eager_worst + 4 * eps * t.abs().max().item():
            raise ArithmeticError(f"tensor {i} is wrong: an element is off by {worst:.2g}, "
                                  f"eager's by {eager_worst:.2g}")  # fmt: skip
        if not norm <= 2 * eager_norm + 2 * eps * t.norm().item():
            raise ArithmeticError(f"tensor {i} is wrong: it is off by {norm:.2g} in all, "
                                  f"eager's by {eager_norm:.2g}")  # fmt: skip


def _figures(samples: list[float], eager: list[float], work: Work, limits: Ceilings | None) -> Row:
    median = statistics.median(samples)
    row: Row = {
        "microseconds": 1e6 * median,
        "over_eager": statistics.median(e / s for e, s in zip(eager, samples, strict=True)),
        "flops": work.flops,
        "bytes": work.bytes,
        "teraflops_per_second": work.flops / median / 1e12,
        "gigabytes_per_second": work.bytes / median / 1e9,
    }
    if limits is not None:
        row["of_ceiling"] = work.seconds(limits) / median
    # every so many rounds, the same ones of every variant: the samples stay paired
    rounds = range(0, len(samples), -(-len(samples) // SAMPLES))
    return row | {"rounds": len(samples), "seconds": [samples[i] for i in rounds]}


class OpsRecord:
    """All cases on one device, each measured when it is asked for, into one record."""

    def __init__(self, args: argparse.Namespace):
        self.device = devices.pick_device(args.device)
        self.dtype, M, C, V = sizes_of(args, self.device)
        if not args.seconds > 0:
            raise ValueError(f"--seconds {args.seconds} must be above 0")
        self.results, self.seconds = args.results, args.seconds
        self.settings = {"M": M, "C": C, "V": V, "dtype": str(self.dtype).removeprefix("torch.")}
        all_cases = {case.op: case for case in cases(self.device, self.dtype, M, C, V)}
        self.cases = {op: case for op, case in all_cases.items() if op in (args.op or all_cases)}
        if len(self.cases) < len(all_cases):
            self.settings["only"] = sorted(self.cases)
        self.without = args.without or ()
        self.machine, self.gpu = machine.check(device=self.device), nvidia_smi.reading()
        self.ceilings = roofline.measure(self.device, self.dtype, min(2.0, args.seconds))
        self._rows: dict[str, list[Row]] = {}

    def rows(self, op: str) -> list[Row]:
        if op not in self._rows:
            case = self.cases[op]
            try:
                variants = [name for name in peers(op) if name not in self.without]
                self._rows[op] = measure(case, self.device, self.seconds, self.ceilings, variants)
            except torch.OutOfMemoryError as error:
                problem = f"{case.shape} does not fit: {str(error)[:200]}"
                self._rows[op] = [{"op": op, "variant": "eager", "problem": problem}]
        return self._rows[op]

    def save(self) -> str:
        rows = [row for of_op in self._rows.values() for row in of_op]
        # a part is no run to compare all ops with
        part = {} if len(self._rows) == len(self.cases) else {"only": sorted(self._rows)}
        more = {"machine": self.machine, "ceilings": self.ceilings._asdict()}
        run = record.new("ops", self.settings | part, rows, nvidia_smi.since(self.gpu), **more)
        return str(record.save(run, self.results))


def sizes_of(args: argparse.Namespace, device: torch.device) -> tuple[torch.dtype, int, int, int]:
    """dtype, M, C, V of the options. ValueError says what is allowed."""
    dtype, C, V = devices.pick_dtype(device, args.dtype), args.width, args.vocabulary
    M = args.tokens if args.tokens is not None else 16384 if device.type == "cuda" else 256
    if M < 1 or (M > 1024 and M % 1024):
        raise ValueError(f"--tokens {M} must be 1 to 1024, or a multiple of 1024")
    if C < 64 or C % 64:
        raise ValueError(f"--width {C} must be a multiple of 64, the size of a head")
    if V < 2:
        raise ValueError(f"--vocabulary {V} must be at least 2")
    return dtype, M, C, V


def add_sizes(add: Callable[..., Any]) -> None:
    """The same for argparse (parser.add_argument) and pytest (parser.addoption)."""
    add("--device", default=None, help="cuda or cpu; the GPU if there is one")
    add("--dtype", default=None, choices=devices.DTYPES, help="bfloat16 on a GPU, else float32")
    add("--tokens", type=int, default=None, help="rows of every op; 16384 on a GPU, else 256")
    add("--width", type=int, default=768, help="C, a multiple of 64")
    add("--vocabulary", type=int, default=50304, help="V")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_sizes(add)
    add("--seconds", type=float, default=5.0, help="for the samples of one op")
    add("--op", nargs="+", choices=OPS, default=None, help="all, unless named")
    add("--without", nargs="+", default=None, metavar="VARIANT", help="not to be run")
    add("--results", type=Path, default=record.RESULTS, help="folder of the records")


def line(row: Row) -> str:
    name = f"{row['op']:<24}{row.get('direction', ''):<9}{row['variant']:<31}"
    if "problem" in row:
        return f"{name}{row['problem']}"
    rate = (
        f"{row['teraflops_per_second']:8.3f} TFLOP/s"
        if row["flops"]
        else f"{row['gigabytes_per_second']:8.1f} GB/s   "
    )
    share = f"{row['of_ceiling']:7.1%} of the ceiling" if "of_ceiling" in row else ""
    return f"{name}{row['microseconds']:11.1f} us{row['over_eager']:7.2f}x eager {rate}{share}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    add_arguments(parser)
    try:
        run = OpsRecord(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
    print(machine.warning(run.machine) or "the machine is quiet")
    for op in run.cases:
        print(*(line(row) for row in run.rows(op)), sep="\n", flush=True)
    print(f"record: {run.save()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
