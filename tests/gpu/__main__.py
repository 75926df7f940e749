"""The GPU suite, `make test-gpu`: what a CPU cannot show, and the kernel tests compiled.

    python -m tests.gpu --budget 480 --out DIR

Most of the time goes into compiling, so several processes share the tests; those that fill the
device's memory run one after another in a process of their own. Needs torch, triton and pytest.
DIR/<n>.txt holds each process's log. What did not end within the budget of seconds has failed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HUGE = "tests/gpu/test_huge.py"
SHARED = ["tests/gpu/test_ops.py", "tests/gpu/test_model.py"]
KERNELS = [
    *(f"kernels/test_{name}" for name in ("layer_norm", "mlp", "cross_entropy", "attention")),
    *(f"model/test_{name}" for name in ("fused", "train_step", "backend", "compile", "training")),
    "commands/test_tune",
]
MAX_PROCESSES = 8  # each holds a CUDA context, and at times some GiB of tensors


def start(tests: list[str], shard: str, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.shard", "--shard", shard]
    command += ["-rfEs", "--tb=short", "--show-capture=no", "--durations=5", "-vv", *tests]
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait(process: subprocess.Popen, until: float) -> bool:
    """Whether its tests passed. Out of time, it is stopped, with what it started."""
    try:
        return process.wait(max(1.0, until - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def report(log: Path, passed: bool) -> Counter[str]:
    """Print what failed or was skipped, and return how many tests ended how."""
    lines = log.read_text().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            print(line)
    last = lines[-1] if lines else ""
    counts = Counter({how: int(n) for n, how in re.findall(r"(\d+) (passed|failed|skipped)", last)})
    if not passed and not counts["failed"]:
        print(f"{log}: did not end; its last line: {last}")
        counts["processes that did not end"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480, help="seconds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/test-gpu"), help="folder of the logs")
    args = parser.parse_args()
    shared = SHARED + [f"tests/{name}.py" for name in KERNELS]
    if not torch.cuda.is_available():
        if os.environ.get("FASTGPT_REHEARSAL") != "1":
            print("No CUDA device. `make test` runs what a CPU can; FASTGPT_REHEARSAL=1 rehearses.")
            return 2
        shared = SHARED
    args.out.mkdir(parents=True, exist_ok=True)
    shards = max(1, min(MAX_PROCESSES, (os.cpu_count() or 2) - 1))
    work = [([HUGE], "0/1")] + [(shared, f"{i}/{shards}") for i in range(shards)]
    until = time.monotonic() + args.budget
    logs = [args.out / f"{i}.txt" for i in range(len(work))]
    running = [start(*what, log) for what, log in zip(work, logs, strict=True)]
    passed = [wait(process, until) for process in running]
    counts: Counter[str] = sum(map(report, logs, passed), Counter())
    print(", ".join(f"{n} {how}" for how, n in counts.items()))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
