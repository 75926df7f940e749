"""How far the kernels are from float64, and eager PyTorch beside them: docs/equivalence.md.

    python -m tests.equivalence [--examples N] [--mutants FILE] [--out FILE]
    python -m tests.equivalence --case OP DTYPE SEED      one input of the report again

Every op gets the same N seeds in every dtype; a seed chooses shapes, layouts and options
(tests/calls.py). The exit status is 1 if an error is beyond what is allowed or a mutant survived.
"""

from tests.conftest import DTYPES  # first: it decides where kernels run, before triton is there

# isort: split
import argparse
import datetime
import json
import math
import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from fastgpt.environment import versions
from tests.calls import LARGE, OPS, some_call
from tests.close import DEVICE, EPS_BUDGET, LAYOUTS, Comparison, compare
from tests.mutants import commit

WHERE = "compiled, on a GPU" if DEVICE == "cuda" else "in Triton's interpreter, on a CPU"
FP32, HALF = EPS_BUDGET[torch.float32], EPS_BUDGET[torch.float16]
METHOD = f"""\
Each op runs on its kernels, forward and backward, and so does its definition in eager PyTorch
(`fastgpt/reference.py`): in the same dtype, and in float64 from the same rounded inputs, which is
the truth here. An error is the largest absolute difference from the truth over the elements of one
output or gradient. It may be at most twice eager's error in the same dtype, plus the largest true
element times {FP32:g} eps (fp32) or {HALF:g} eps (16 bits): the rule that the tests enforce
(`tests/close.py`). The inputs are drawn by seed: odd sizes, with and without biases, every tensor
and incoming gradient in one of {len(LAYOUTS)} memory layouts (`tests/calls.py`).

The tables give the median and the largest error over the inputs, each beside eager's on the same
inputs, in roundings: eps of the dtype times the largest true element of that result. *largest /
eager's* is worst against worst. *of allowed* is the largest share of what the rule allows on any
input: above 1 a test would fail. On a single input the quotient of the two errors says little:
eager may happen to be exact there, which is also why the rule has its second term.

dq and dk of a single token are exactly 0. Flash attention computes them as the difference of two
equal sums and keeps their roundings, eager's softmax gets the 0; their errors count in roundings
of the largest result of that input. Losses are fp32 even from 16-bit logits, whose roundings they
carry, eager's as well."""


# Why an error is larger than eager's on most inputs, and not only on the worst of them.
REASONS = {
    ("linear_cross_entropy", "gradient of x", "cpu"): "on AMD's CPUs this product is oneDNN's, "
    "which adds up V terms in longer chains than MKL does; with MKL 1.10, larger on 15 of 25",
    ("causal_attention", "gradient of q", "cpu"): "delta comes from the output as it is stored, in "
    "16 bits, as in any flash attention; from the unrounded one 0.93, larger on 13 of 25",
    ("mlp, cuBLAS GEMM", "gradient of fc_bias", "cpu"): "rows are added up in strips, one strip "
    "after the other; PyTorch adds them up in a tree",
}


def ratio(a: float, b: float) -> float:
    """a / b, in which 0 / 0 is no error and a NaN the largest there is."""
    if a == 0:
        return 0.0
    return math.inf if b == 0 or math.isnan(a) else a / b


class Result(NamedTuple):
    seed: int
    words: str  # the input
    found: Comparison

    def roundings(self, error: float) -> float:
        return ratio(error, torch.finfo(self.found.dtype).eps * self.found.scale)

    @property
    def of_allowed(self) -> float:
        return ratio(self.found.error, self.found.allowed)


class Row(NamedTuple):
    """An output or a gradient of an op in one dtype, and how it came out on every input."""

    op: str
    dtype: str
    what: str
    results: list[Result]

    def roundings(self, of: Callable[[Comparison], float]) -> list[float]:
        return [r.roundings(of(r.found)) for r in self.results]

    @property
    def errors(self) -> list[float]:
        return self.roundings(lambda found: found.error)

    @property
    def eager_errors(self) -> list[float]:
        return self.roundings(lambda found: found.eager_error)

    @property
    def to_eager(self) -> float:
        """Worst against worst."""
        return ratio(max(self.errors), max(self.eager_errors))

    @property
    def larger(self) -> int:
        """On how many inputs it is larger than eager's."""
        return sum(a > b for a, b in zip(self.errors, self.eager_errors, strict=True))

    @property
    def why(self) -> str:
        """Two ways of rounding that are alike lose on as many inputs as they win, by 2 sigma."""
        won = sum(a < b for a, b in zip(self.errors, self.eager_errors, strict=True))
        if abs(self.larger - won) <= 2 * math.sqrt(self.larger + won) or self.larger < won:
            return "chance: elsewhere it is as often smaller"
        return REASONS.get((self.op, self.what, DEVICE), "not known")

    @property
    def worst(self) -> Result:
        """The input that comes closest to what is allowed."""
        return max(self.results, key=lambda r: r.of_allowed)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(op: str, dtype: torch.dtype, seeds: Sequence[int]) -> list[Row]:
    results = defaultdict(list)
    for seed in seeds:
        call = some_call(OPS[op], random.Random(seed).choice, [dtype], LARGE)
        for found in compare(call.ours, call.ref, *call.inputs, grads=call.grads):
            results[found.what].append(Result(seed, call.words, found))
    return [Row(op, name_of(dtype), what, each) for what, each in results.items()]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def figures(rows: list[Row]) -> str:
    head = ["result", "dtype", "median", "eager's", "largest", "eager's"]
    return table(
        [*head, "largest / eager's", "of allowed"],
        [
            [row.what, row.dtype]
            + [f"{median(each):.2f}" for each in (row.errors, row.eager_errors)]
            + [f"{max(each):.2f}" for each in (row.errors, row.eager_errors)]
            + [f"{row.to_eager:.2f}", f"{row.worst.of_allowed:.2f}"]
            for row in rows
        ],
    )


def worst_inputs(rows: list[Row]) -> str:
    return table(
        ["result", "dtype", "seed", "error", "eager", "allowed", "input"],
        [
            [row.what, row.dtype, str(worst.seed), f"{found.error:.1e}"]
            + [f"{found.eager_error:.1e}", f"{found.allowed:.1e}", worst.words]
            for row in rows
            for worst, found in [(row.worst, row.worst.found)]
        ],
    )


def in_short(rows: list[Row], verdicts: list[dict[str, str]]) -> str:
    results = [r for row in rows for r in row.results]
    within = [r for r in results if r.of_allowed <= 1]
    above = sorted((row for row in rows if row.to_eager > 1), key=lambda row: -row.to_eager)
    caught = [verdict for verdict in verdicts if verdict["caught_by"]]
    lines = [
        f"{len(within)} of {len(results)} errors are within what is allowed; the largest is "
        f"{max(r.of_allowed for r in results):.2f} of it.",
        f"{len(rows) - len(above)} of {len(rows)} results (each output and gradient in each dtype) "
        "have a largest error of at most eager's.",
        f"{len(caught)} of {len(verdicts)} mutants are caught by the tests."
        if verdicts
        else "No mutants were tried in this run.",
    ]
    listed = [
        [row.op, row.what, row.dtype, f"{row.to_eager:.2f}", f"{row.worst.of_allowed:.2f}"]
        + [f"{ratio(median(row.errors), median(row.eager_errors)):.2f}"]
        + [f"{row.larger} of {len(row.results)}", row.why]
        for row in above
    ]
    head = ["op", "result", "dtype", "largest / eager's", "of allowed", "median / eager's"]
    head += ["larger on", "why"]
    others = f"\n\nA larger one than eager's:\n\n{table(head, listed)}" if above else ""
    return bullets(lines) + others


def not_shown() -> str:
    lines = [
        "Dropout: its kernels are held to their own exported mask in "
        "`tests/kernels/test_attention.py`."
    ]
    if DEVICE == "cpu":
        lines += [
            "A GPU. The interpreter executes the kernels' own source, but not the code a compiler "
            "makes of it: tensor cores, TF32, fused multiply-adds and races between threads are "
            "not covered.",
            "bfloat16, which Triton's interpreter computes wrongly.",
            "Offsets beyond 32 bits, but for LayerNorm's columns; sequences of thousands.",
        ]
    return bullets(lines)


def mutants_section(verdicts: list[dict[str, str]], commit_of_mutants: str) -> str:
    tried = Counter(v["file"] for v in verdicts)
    caught = Counter(v["file"] for v in verdicts if v["caught_by"])
    counts = [[f"`{file}`", str(n), str(caught[file])] for file, n in sorted(tried.items())]
    listed = [
        [f"`{v['file']}`", f"`{v['function']}`", v["name"]]
        + [f"`{v['caught_by']}`" if v["caught_by"] else "**survived**"]
        + [f"`{v['how'].removeprefix('AssertionError: ')[:80]}`" if v["how"] else ""]
        for v in verdicts
    ]
    return "\n\n".join(
        [
            "## Mutants",
            "Each is one deliberate fault in a kernel (`tests/mutations/`), put into a copy of the "
            "tree whose tests pass without it; *caught by* is the first test that failed, with "
            f"what it said (`python -m tests.mutants`, at commit {commit_of_mutants}).",
            table(["file", "mutants", "caught"], counts),
            table(["file", "function", "fault", "caught by", "how"], listed),
        ]
    )


def report(rows: list[Row], examples: int, mutants: dict[str, Any] | None) -> str:
    verdicts = mutants["verdicts"] if mutants else []
    found = versions()
    packages = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "python"))
    now = datetime.datetime.now(datetime.timezone.utc)
    sections = [
        "# Numerical equivalence with eager PyTorch",
        "Written by `make equivalence` (`tests/equivalence.py`).",
        table(
            ["where", "device", "versions", "commit", "date"],
            [[WHERE, found["device"], packages, commit(), f"{now:%Y-%m-%d}"]],
        ),
        in_short(rows, verdicts),
        "## Method",
        METHOD,
        f"Every op gets the seeds 0 to {examples - 1} in every dtype. One input again: "
        "`python -m tests.equivalence --case OP DTYPE SEED`.",
        "## What this does not show",
        not_shown(),
        "## Op by op",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        sections += [f"### {op}", figures(of_op), "The inputs closest to what is allowed:"]
        sections += [worst_inputs(of_op)]
    if mutants:
        sections.append(mutants_section(verdicts, mutants["commit"]))
    return "\n\n".join(sections) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the kernels against float64.")
    parser.add_argument("--examples", type=int, default=25, help="inputs per op and dtype")
    parser.add_argument("--mutants", type=Path, help="what python -m tests.mutants --out wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/equivalence.md"))
    parser.add_argument("--case", nargs=3, metavar=("OP", "DTYPE", "SEED"))
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # of masked lanes
    if args.case:
        op, dtype, seed = args.case
        if op not in OPS:
            parser.error(f"there is no op {op!r}; there are: {'; '.join(OPS)}")
        print(worst_inputs(measure(op, getattr(torch, dtype), [int(seed)])))
        return 0
    mutants = json.loads(args.mutants.read_text()) if args.mutants else None
    rows = []
    for op in OPS:
        for dtype in DTYPES:
            rows += measure(op, dtype, range(args.examples))
            print(f"{op}, {name_of(dtype)}: done", flush=True)
    args.out.write_text(report(rows, args.examples, mutants))
    survived = mutants and any(not verdict["caught_by"] for verdict in mutants["verdicts"])
    return 1 if survived or any(row.worst.of_allowed > 1 for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
