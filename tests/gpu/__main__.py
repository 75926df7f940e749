"""The GPU suite, `make test-gpu`: what a CPU cannot show, and the kernel tests compiled.

    python -m tests.gpu --budget 480 --out DIR

Most of the time goes into compiling, so several processes share the tests. One that dies, or hangs
in a test, is started again for the tests after that one. Those that fill the device's memory run
alone, after all others. Needs torch, triton and pytest. DIR/outcomes-<n>.jsonl tells how each test
ended, with its seed; DIR/<n>.txt is a process's log. With --resume, what ended is not run again.
Exit codes: 0 all passed, 1 some failed, 2 no GPU, 3 some did not run within the budget of seconds.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.gpu.shard import UNFINISHED, outcomes, read, write

ROOT = Path(__file__).parents[2]
HUGE = "tests/gpu/test_huge.py"
RACES = "tests/gpu/test_specialized.py"
SHARED = ["tests/gpu/test_ops.py", "tests/gpu/test_model.py"]
KERNELS = [
    *(f"kernels/test_{name}" for name in ("layer_norm", "gelu", "mlp", "cross_entropy")),
    *(f"kernels/test_{name}" for name in ("attention", "adamw", "decode")),
    *(f"model/test_{name}" for name in ("fused", "train_step", "second_stream", "backend")),
    *(f"model/test_{name}" for name in ("compile", "training")),
    "decoding/test_decoding",
    "decoding/test_draws",
    "commands/test_tune",
]
MAX_PROCESSES = 16
GIB_OF_A_PROCESS = 6.0  # a CUDA context, and at times some GiB of tensors
MAX_STARTS = 20
HUNG = 120.0  # seconds in one test; compiling for many configurations takes a minute
ENDED = (0, 1, 5)  # pytest's exit codes: all passed, some failed, nothing left to run


class Shard:
    """One process after another, until every test of a share of them has ended."""

    def __init__(self, tests: list[str], share: str, out: Path, name: str):
        self.tests, self.share = tests, share
        self.log, self.outcomes = out / f"{name}.txt", out / f"outcomes-{name}.jsonl"
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.seen = self._lines()
        command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.shard", "--shard", self.share]
        command += ["--outcomes", str(self.outcomes), "-rfEs", "--tb=short", "--show-capture=no"]
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                [*command, "-vv", "--durations=5", *self.tests],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        """Whether tests of it are still to come. A process that died or hangs is started anew."""
        code, said = self.process.poll(), self._lines()
        last = said[-1] if said else {}
        in_a_test = last.get("outcome") == "started"
        if code is None:
            if not in_a_test or time.time() - self.outcomes.stat().st_mtime < HUNG:
                return True
            self.stop()
            self._blame(last, "hung", f"no end within {HUNG:.0f} s")
        elif code in ENDED:
            return False
        elif in_a_test:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._blame(last, "crashed", f"the process ended with {how}")
        got_on = any(line["outcome"] != "waiting" for line in self._lines()[len(self.seen) :])
        if self.starts == MAX_STARTS or not got_on:
            lines = self.log.read_text(errors="replace").splitlines()
            print(f"{self.log}: did not end; its last line: {lines[-1] if lines else ''}")
            return False
        self.start()
        return True

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _blame(self, started: dict, outcome: str, why: str) -> None:
        more = {name: started.get(name) for name in ("seed", "ops")}
        write(self.outcomes, started["test"], outcome, why=why, **more)

    def _lines(self) -> list[dict]:
        return read(self.outcomes) if self.outcomes.exists() else []


def run(shards: list[Shard], until: float) -> None:
    while shards and time.monotonic() < until:
        shards = [shard for shard in shards if shard.running()]
        time.sleep(0.2)
    for shard in shards:
        shard.stop()


def report(out: Path) -> Counter[str]:
    """Print what failed or was skipped, and return how many tests ended how."""
    found = outcomes(out)
    for test, line in found.items():
        if line["outcome"] not in ("passed", *UNFINISHED):
            why = line.get("why") or ""
            print(f"{line['outcome'].upper()} {test} (seed {line.get('seed')}): {why}")
    counts = Counter(line["outcome"] for line in found.values())
    print(", ".join(f"{n} {how}" for how, n in counts.items()))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480, help="seconds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/test-gpu"), help="folder of the logs")
    parser.add_argument("--part", choices=["all", "ops", "huge", "races"], default="all")
    parser.add_argument("--resume", action="store_true", help="go on with the tests of --out")
    args = parser.parse_args()
    shared = SHARED + [f"tests/{name}.py" for name in KERNELS]
    if not torch.cuda.is_available():
        if os.environ.get("FASTGPT_REHEARSAL") != "1":
            print("No CUDA device. `make test` runs what a CPU can; FASTGPT_REHEARSAL=1 rehearses.")
            return 2
        shared = SHARED
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for path in (*args.out.glob("outcomes-*.jsonl"), *args.out.glob("*.txt")):
            path.unlink()
    until = time.monotonic() + args.budget
    count = max(1, min(MAX_PROCESSES, os.cpu_count() or 2))
    if torch.cuda.is_available():
        count = max(1, min(count, int(torch.cuda.mem_get_info()[0] / 2**30 / GIB_OF_A_PROCESS)))
    if args.part in ("all", "ops"):
        run([Shard(shared, f"{i}/{count}", args.out, str(i)) for i in range(count)], until)
    if args.part in ("all", "huge"):  # alone: 80 GB are enough for these, for nothing beside them
        run([Shard([HUGE], "0/1", args.out, "huge")], until)
    if args.part in ("all", "races"):  # last: nobody knows yet whether these would hang
        run([Shard([RACES], "0/1", args.out, "races")], until)
    counts = report(args.out)
    if not counts or any(counts[how] for how in UNFINISHED):
        return 3
    return 1 if any(counts[how] for how in ("failed", "crashed", "hung")) else 0


if __name__ == "__main__":
    sys.exit(main())
