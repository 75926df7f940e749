"""The benchmark runs, believes no variant whose losses differ, and leaves a record."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = ["--size", "char", "--device", "cpu", "--dtype", "float32", "--batch-size", "2"]


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.train", *QUICK, "--rounds", "1", "--steps", "1", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_record_and_table(tmp_path):
    done = bench("--variants", "eager", "fastgpt", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["schema"] == 1 and record["environment"]["torch"]
    eager, ours = record["rows"]
    assert eager["variant"] == "eager" and eager["over_eager"] == 1.0
    assert ours["tokens_per_second"] > 0 and abs(ours["final_loss"] - eager["final_loss"]) < 1e-3
    assert f"{ours['tokens_per_second']:,.0f}" in done.stdout


def test_ratios_need_eager_first():
    done = bench("--variants", "fastgpt")
    assert done.returncode == 2 and "ratios need eager first" in done.stderr
