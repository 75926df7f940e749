"""The goals of decoding beside what this machine measures: one command, on a quiet machine.

    NANOGPT_DIR=... python -m bench.decode_goals

Decodes with 124M from 224 tokens in fp32 and bf16, and one token from one, beside nanoGPT; writes
the records of bench.decode. Exits with 1 if a goal is missed or could not be measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import decode
from bench.harness import machine, record
from bench.reports import terminal

ROUNDS = 7
VARIANTS = ["eager", "nanogpt", "fastgpt"]


class Goal(NamedTuple):
    name: str
    least: float | None  # None: shown beside the goals
    measured: float | None  # None: not measured
    form: str = ".2f"

    @property
    def met(self) -> bool:
        return self.least is None or (self.measured is not None and self.measured >= self.least)


def on_cpu(out: Path, size: str, prompt: int, new_tokens: int) -> list[Goal]:
    rows = {
        dtype: _measured(decode.Settings(size, prompt, new_tokens, dtype, ROUNDS), out)
        for dtype in ("float32", "bfloat16")
    }
    one = _measured(decode.Settings(size, 1, 2, "float32", ROUNDS), None)  # no rate to record
    fp32, bf16 = (rows[dtype].get("fastgpt", {}) for dtype in rows)
    both = "tokens_per_second" in fp32 and "tokens_per_second" in bf16
    twice = bf16["tokens_per_second"] / fp32["tokens_per_second"] if both else None
    return [
        Goal("fp32, of the read bandwidth", 0.90, fp32.get("of_floor"), ".1%"),
        Goal("bf16, of the read bandwidth", 0.85, bf16.get("of_floor"), ".1%"),
        Goal("1 token from 1, times as fast as nanoGPT", 1.0, _first(one)),
        Goal("bf16 over fp32, tokens/s", None, twice),
        Goal("fp32, times as fast as nanoGPT", None, fp32.get("over_nanogpt")),
        Goal("bf16, times as fast as nanoGPT", None, bf16.get("over_nanogpt")),
    ]


def on_gpu(out: Path, size: str, prompt: int, new_tokens: int) -> list[Goal]:
    one, many = (
        _measured(decode.Settings(size, prompt, new_tokens, "bfloat16", ROUNDS, batch), out)
        for batch in (1, 64)
    )
    row = one.get("fastgpt", {})
    return [
        Goal("batch 1, tokens/s", 5000, row.get("tokens_per_second"), ",.0f"),
        Goal("batch 1, times as fast as nanoGPT", 10, row.get("over_nanogpt")),
        Goal("batch 1, of the read bandwidth", None, row.get("of_floor"), ".1%"),
        Goal("batch 64, tokens/s", None, many.get("fastgpt", {}).get("tokens_per_second"), ",.0f"),
    ]


def by_count() -> list[Goal]:
    """What needs no GPU, in a process of its own: this one may have Triton's interpreter."""
    command = [sys.executable, "-m", "bench.predict", "--token", "512", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    counts = json.loads(done.stdout) if done.returncode == 0 else {}
    launches, over = (counts.get(key) for key in ("launches", "over_least"))
    return [
        Goal("62 over launches a token", 1.0, 62 / launches if launches else None),
        Goal("weights and cache, of bytes moved", 1 / 1.1, 1 / over if over else None, ".1%"),
    ]


def _measured(settings: decode.Settings, out: Path | None) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = [*VARIANTS, "hf-static"] if device.type == "cuda" else VARIANTS
    run = decode.measure(settings, device, variants)
    if out is not None:
        record.save(run, out)
    print(f"{terminal.text(run)}\n", flush=True)
    return {row["variant"]: row for row in run["rows"] if "problem" not in row}


def _first(rows: dict[str, Any]) -> float | None:
    """How many times as fast as nanoGPT to the first token."""
    if "nanogpt" not in rows or "fastgpt" not in rows:
        return None
    nanogpt, fastgpt = (rows[name]["first_token_seconds"] for name in ("nanogpt", "fastgpt"))
    return statistics.median(a / b for a, b in zip(nanogpt, fastgpt, strict=True))


def line(goal: Goal) -> str:
    measured, least = (
        "-" if x is None else format(x, goal.form) for x in (goal.measured, goal.least)
    )
    verdict = "" if goal.least is None else "met" if goal.met else "MISSED"
    if goal.least is not None and goal.measured is None:
        verdict = "NOT MEASURED"
    return f"{goal.name:42} {least:>7} {measured:>9}  {verdict}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decode_goals", description=__doc__)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the records")
    args = parser.parse_args(argv)
    machine_says = machine.warning(machine.check(device=torch.device("cpu")))
    if torch.cuda.is_available():
        goals = on_gpu(args.out, "124M", 224, 256)
    else:
        goals = on_cpu(args.out, "124M", 224, 32)
    goals += by_count()
    print(f"{'goal':42} {'least':>7} {'measured':>9}")
    print("\n".join(map(line, goals)))
    if machine_says:
        print(machine_says)
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
