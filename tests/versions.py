"""The whole test suite under every supported pair of PyTorch and Triton: `make test-versions`.

Each pair gets a virtual environment of its own under .versions/, 2 to 7 GB, made or brought up to
date first. Prints a line per pair at the end and fails if any pair does; what pytest said is in
.versions/<pair>.log. Arguments name pairs, all by default.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
VENVS = ROOT / ".versions"
TOOLS = "-e", ".[dev,data,hf]", "setuptools", "wheel"  # the last two for the tests of packaging


class Pair(NamedTuple):
    python: str  # taken if it is on the PATH, else the Python that runs this
    packages: list[str]


PAIRS = {
    # older Tritons' interpreters fail under a newer numpy
    "oldest": Pair("python3.10", ["torch==2.6.0", "triton==3.2.0", "numpy<2.4"]),  # setup.py's
    # what machines with GPUs come with
    "2.11": Pair("python3.12", ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"]),
    "2.13": Pair("python3.12", ["torch==2.13.0", "triton==3.7.1"]),  # constraints.txt's
    "newest": Pair("python3.13", ["torch"]),  # and the Triton that it asks for
}


def interpreter(name: str) -> str:
    """The path of a Python that starts: there are stand-ins on the PATH that do not."""
    path = shutil.which(name)
    works = path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
    return path if path and works else sys.executable


def installed(name: str, pair: Pair, log: Path) -> Path | None:
    """The Python of the pair's environment, or None where it could not be made."""
    python = VENVS / name / "bin" / "python"
    make = [interpreter(pair.python), "-m", "venv", str(VENVS / name)]
    fill = [str(python), "-m", "pip", "install", "--upgrade", *pair.packages, *TOOLS]
    for command in ([] if python.exists() else [make]) + [fill]:
        with log.open("a") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            return None
    return python


def tested(name: str, pair: Pair, pytest_args: list[str]) -> tuple[bool, str]:
    """Whether the suite passes, and what there is to say of it."""
    log = VENVS / f"{name}.log"
    log.write_text("")
    print(f"{name}: installing, then testing; follow {log.relative_to(ROOT)}", flush=True)
    python = installed(name, pair, log)
    if python is None:
        return False, f"could not be installed, see {log.relative_to(ROOT)}"
    code = "import sys, torch, triton; print('Python', sys.version.split()[0], 'torch',"
    code += "torch.__version__, 'triton', triton.__version__)"
    versions = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    command = [python, "-m", "pytest", "-n", "auto", "-m", "", "-rs", *pytest_args]
    with log.open("a") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    summary = log.read_text().rstrip().rsplit("\n", 1)[-1].strip("= ")
    return done.returncode == 0, f"{versions}: {summary}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", nargs="*", help=f"of {', '.join(PAIRS)}; default all")
    parser.add_argument("--pytest", default="", help="arguments to pytest, in one string")
    args = parser.parse_args()
    unknown = set(args.pairs) - set(PAIRS)
    if unknown:
        parser.error(f"unknown pair {', '.join(unknown)}; use {', '.join(PAIRS)}")
    VENVS.mkdir(exist_ok=True)
    chosen = args.pairs or list(PAIRS)
    results = {name: tested(name, PAIRS[name], shlex.split(args.pytest)) for name in chosen}
    for name, (passed, words) in results.items():
        print(f"{'passed' if passed else 'FAILED'}  {name}: {words}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
