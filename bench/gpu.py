"""Everything a GPU session is for, most valuable first, within a budget of seconds.

    python -m bench.gpu --budget 540 --out DIR

Works from a bare checkout. Stages run in order until the budget is spent; after each, DIR/gpu.json
is written again, so that whatever ended is kept. DIR/records is for bench/results, DIR/tuned.json
for kernels/_tuned.py. The short table is printed last. Without a GPU the same stages run on toy
sizes, which proves the script and measures nothing. Correctness is tests/gpu's, a command before.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import launchers, ops, train
from bench.harness import record
from bench.harness.ceilings import Variants, in_turns
from fastgpt.commands import tune
from fastgpt.environment import versions

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]


class Session:
    """The budget, the sizes, and the record as far as it has come."""

    def __init__(self, budget: float, out: Path):
        self.start, self.budget, self.path = time.perf_counter(), budget, out / "gpu.json"
        self.records = out / "records"  # to be copied into bench/results, for the report
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.M, self.C, self.V = (16384, 768, 50304) if self.on_gpu else (64, 64, 97)
        self.record: Record = {
            "schema": 1,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": versions(),
            "commit": record.commit(),
            "stages": {},
        }

    def size(self, name: str, batch_size: int) -> list[str]:
        """The options of such a model; a toy's where there is no GPU."""
        chosen = (name, batch_size) if self.on_gpu else ("char", 2)
        return ["--size", chosen[0], "--batch-size", str(chosen[1])]

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.start)

    def run(self, name: str, stage: Callable[["Session", float], Any], share: float) -> None:
        """Give a stage its share of the budget; what it raises is its result, not the end."""
        seconds = min(share * self.budget, self.left())
        if seconds < 0.02 * self.budget:
            self.record["stages"][name] = {"problem": "no budget was left"}
            return
        began = time.perf_counter()
        try:
            result = stage(self, seconds)
        except Exception as error:
            traceback.print_exc()
            result = {"problem": f"{type(error).__name__}: {error}"}
        took = time.perf_counter() - began
        self.record["stages"][name] = {"seconds": took, "result": result}
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")
        print(f"{name}: {took:.0f}s of {seconds:.0f}s, {self.left():.0f}s left", flush=True)


def gemm(session: Session, seconds: float) -> list[Record]:
    """TFLOP/s of cuBLAS on every GEMM of a training step: the ceiling of everything else."""
    M, C, V = session.M, session.C, session.V
    rows = []
    layers = {
        "qkv": (C, 3 * C),
        "proj": (C, C),
        "fc": (C, 4 * C),
        "proj2": (4 * C, C),
        "head": (C, V),
    }
    for name, (K, N) in layers.items():
        x, w, dy = (
            torch.randn(shape, device=session.device).to(session.dtype)
            for shape in ((M, K), (N, K), (M, N))
        )
        calls: Variants = {
            "forward": functools.partial(torch.mm, x, w.t()),
            "dgrad": functools.partial(torch.mm, dy, w),
            "wgrad": functools.partial(torch.mm, dy.t(), x),
        }
        for direction, samples in in_turns(calls, session.device, seconds / len(layers)).items():
            median = statistics.median(samples)
            rows.append({
                "layer": name, "direction": direction, "shape": [M, K, N],
                "microseconds": 1e6 * median, "teraflops_per_second": 2e-12 * M * K * N / median,
            })  # fmt: skip
    return rows


def per_op(session: Session, seconds: float) -> list[Record]:
    run = ops.Run(
        argparse.Namespace(
            device=str(session.device),
            dtype=str(session.dtype).removeprefix("torch."),
            tokens=session.M,
            width=session.C,
            vocabulary=session.V,
            seconds=seconds / 18,  # eight ops and the ceilings; as long again to compile
            results=session.records,
        )
    )
    rows = [row for op in run.cases for row in run.rows(op)]
    run.save()
    return rows


def beside_gemms(session: Session, seconds: float) -> list[Record]:
    n_params = 124_000_000 if session.on_gpu else 100_000
    return launchers.measure(session.device, session.dtype, session.M, session.C, n_params, seconds)


def _opponent() -> str:
    return "nanogpt-compile" if "NANOGPT_DIR" in os.environ else "compile"


def training(size: str, batch_size: int) -> Callable[[Session, float], Any]:
    def stage(session: Session, seconds: float) -> Record:
        variants = ["eager", _opponent()]
        variants += ["fastgpt", "fastgpt-nologits", "fastgpt-step"]  # few: a compile takes a minute
        variants += ["fastgpt-step-graph"] * session.on_gpu + ["liger"] * (batch_size == 16)
        said = _module("bench.train", *session.size(size, batch_size), "--rounds", "3", "--steps",
                       "10", "--out", str(session.records), "--variants", *variants,
                       seconds=seconds)  # fmt: skip
        return json.loads(Path(said.split("record: ")[1].strip()).read_text())

    assert size in train.SIZES
    return stage


def profile(session: Session, seconds: float) -> list[Record]:
    """Where the time of a step goes: ours, and that of the hardest opponent."""
    rows = []
    for variant, share in (("fastgpt-step", 0.3), (_opponent(), 0.7)):  # one of them compiles
        folder = session.path.with_name("profile")
        try:
            said = _module("bench.profiler", *session.size("124M", 16), "--variant", variant,
                           "--out", str(folder), seconds=share * seconds)  # fmt: skip
        except Exception as error:
            rows.append({"variant": variant, "problem": f"{type(error).__name__}: {error}"})
            continue
        (folder / f"{variant}.txt").write_text(said)
        rows.append({"variant": variant, "text": said})
    return rows


def specialized(session: Session, seconds: float) -> list[Record]:
    """The fused GEMM with warp specialisation, apart: nobody knows yet whether it would hang."""
    said = _module("bench.specialized", "--tokens", str(session.M), "--width", str(session.C),
                   seconds=seconds)  # fmt: skip
    return [json.loads(line) for line in said.splitlines()]


def _module(name: str, *args: str, seconds: float) -> str:
    """What a module prints, run in a process of its own: memory is clean, and it can be stopped."""
    command = [sys.executable, "-m", name, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def search(session: Session, seconds: float) -> list[Record]:
    """What `fastgpt tune` does; tuned.json is the entry that kernels/_tuned.py would read."""
    sizes = tune.Sizes(session.M, session.C, min(64, session.C // 2), session.V, session.dtype)
    searched = tune.search(session.device, sizes, 0.8 * seconds)
    races = tune.implementations(session.device, sizes, 0.2 * seconds)
    entry = tune.choose(races, searched)
    session.path.with_name("tuned.json").write_text(json.dumps(entry, indent=1) + "\n")
    return races + searched


STAGES = (  # share of the budget, at most
    ("gemm", gemm, 0.03),
    ("train 124M B=16", training("124M", 16), 0.28),
    ("profile", profile, 0.2),
    ("per op", per_op, 0.13),
    ("beside GEMMs", beside_gemms, 0.04),
    ("specialized", specialized, 0.06),
    ("train 124M B=4", training("124M", 4), 0.22),
    ("search", search, 1.0),
)


def table(record: Record) -> str:
    """The few lines that must survive a cut-off reply."""
    lines = [f"{record['environment']['device']}, {record['commit'][:9]}"]
    for name, stage in record["stages"].items():
        result = stage.get("result", stage)
        if isinstance(result, dict) and "problem" in result:
            lines.append(f"{name}: {result['problem'][-200:]}")
        elif name == "search":
            slowest_first = sorted(result, key=lambda row: -row.get("microseconds", math.inf))
            best = {row.get("op") or row["kernel"]: row for row in slowest_first}
            lines += [f"{name:8} {_short(row)}" for row in best.values()]
        elif name.startswith("train"):
            lines += [f"{name:16} {_short(row)}" for row in result["rows"]]
        else:
            lines += [f"{name:8} {_short(row)}" for row in result]
    return "\n".join(lines)


def _short(row: Record) -> str:
    if "problem" in row:
        return f"{row.get('op', '')} {row['variant']}: {row['problem'][:90]}"
    wanted = (
        "op", "layer", "kernel", "direction", "variant", "microseconds", "teraflops_per_second",
        "tokens_per_second", "over_eager", "over_default", "of_ceiling",
    )  # fmt: skip
    if "text" in row:  # a profile: the line that sums it up
        return next(line for line in row["text"].splitlines() if line.startswith("step"))
    shown = (
        f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in wanted if k in row
    )
    return " ".join(shown)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the record")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(args.budget, args.out)
    for name, stage, share in STAGES:
        if stage is search:  # the last: what is known by now must not be lost with it
            print(table(session.record), flush=True)
        session.run(name, stage, share)
    print(table(session.record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
