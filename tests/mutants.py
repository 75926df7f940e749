"""Mutation testing: break kernels, and what decides about them, and see that the tests notice.

    python -m tests.mutants [--out FILE] [NAME ...]

The mutants are in tests/mutations/<name>.diff, one below another; tests/test_<name>.py is to catch
them:

    @@ file function, class or macro: what is wrong now
    -text that occurs in it once (in C: in the file)
    +what stands there instead

A file is one of kernels/, or of fastgpt/ where that has none of the name. In a copy of the tree,
whose tests have to pass first, a mutant takes the place of the code, and the tests run until the
first failure. A line per mutant says which test caught it; the exit status is 1 if any survived.
"""

import argparse
import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    file: str
    function: str  # or class, or macro
    name: str
    old: str
    new: str
    test: str  # tests/test_<test>.py is to catch it

    def path(self, tree: Path) -> Path:
        of_kernels = tree / "kernels" / self.file
        return of_kernels if of_kernels.exists() else tree / "fastgpt" / self.file

    def within(self, source: str) -> str:
        """The source of its file, broken."""
        for first, last in self._spans(source):
            if source.count(self.old, first, last) == 1:
                return (
                    source[:first] + source[first:last].replace(self.old, self.new) + source[last:]
                )
        raise ValueError(
            f"mutant {self.name!r} of tests/mutations/{self.test}.diff: {self.function} of "
            f"{self.file} no longer contains {self.old!r} once; adapt it to the code"
        )

    def _spans(self, source: str) -> Iterator[tuple[int, int]]:
        """Where the function stands, first and last character; of C, the whole file."""
        if not self.file.endswith(".py"):
            if re.search(rf"\b{self.function}\b", source):
                yield 0, len(source)
            return
        lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
        for node in ast.parse(source).body:
            if getattr(node, "name", None) == self.function:
                assert isinstance(node, ast.stmt) and node.end_lineno is not None
                yield lines[node.lineno - 1], lines[node.end_lineno]


class Verdict(NamedTuple):
    file: str
    function: str
    name: str
    caught_by: str  # a test's id; empty if the mutant survived
    how: str  # that test's message


def mutants() -> Iterator[Mutant]:
    for path in sorted((ROOT / "tests/mutations").glob("*.diff")):
        for entry in re.split("^@@ ", path.read_text(), flags=re.MULTILINE)[1:]:
            title, *lines = entry.splitlines()
            place, name = title.split(": ", 1)
            old, new = ("\n".join(t[1:] for t in lines if t[:1] == sign) for sign in "-+")
            yield Mutant(*place.split(), name, old, new, path.stem)


def run_tests(tree: Path, name: str) -> subprocess.CompletedProcess[str]:
    """tests/**/test_<name>.py up to its first failure, beginning with what failed the last time."""
    options = ["-x", "--failed-first", "--tb=no", "-rf"]
    (path,) = tree.glob(f"tests/**/test_{name}.py")
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    env = {
        **os.environ,
        "COLUMNS": "300",  # pytest cuts messages to fit
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # importing them takes as long as a test
    }
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def judge(mutant: Mutant, tree: Path) -> Verdict:
    path = mutant.path(tree)
    source = path.read_text()
    path.write_text(mutant.within(source))
    done = run_tests(tree, mutant.test)
    path.write_text(source)
    failed = re.search(r"^FAILED tests/\S+?::(.+?) - (.+)$", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        caught_by, how = "", ""
    elif done.returncode < 0:  # a read far outside of memory
        caught_by, how = f"test_{mutant.test}.py", f"killed by signal {-done.returncode}"
    elif done.returncode == 1 and failed:
        caught_by, how = failed.groups()
    else:
        output = done.stdout[-2000:] + done.stderr
        raise RuntimeError(f"{mutant.name}: pytest could not run\n{output}")
    return Verdict(mutant.file, mutant.function, mutant.name, caught_by, how)


def verdicts(chosen: list[Mutant]) -> Iterator[Verdict]:
    """In the order of `chosen`, as many at a time as there are cores, each in a tree of its own."""
    trees: Queue[Path] = Queue()

    def in_a_tree(do: Callable[[Path], Any]) -> Any:
        tree = trees.get()
        try:
            return do(tree)
        finally:
            trees.put(tree)

    def passes(name: str) -> None:
        done = in_a_tree(lambda tree: run_tests(tree, name))
        if done.returncode != 0:
            raise RuntimeError(f"without a mutant, test_{name}.py fails:\n{done.stdout}")

    workers = os.cpu_count() or 1
    skip = shutil.ignore_patterns(".*", "out", "__pycache__")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        for i in range(workers):
            tree = Path(folder) / f"fastgpt{i}"
            trees.put(shutil.copytree(ROOT, tree, symlinks=True, ignore=skip))
        list(pool.map(passes, sorted({mutant.test for mutant in chosen})))
        yield from pool.map(lambda mutant: in_a_tree(lambda tree: judge(mutant, tree)), chosen)


def commit() -> str:
    """Of the checkout; "-dirty" where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the kernels and see that the tests notice.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a mutant, or all of attention, ..."
    )
    parser.add_argument("--out", type=Path, help="write what became of each to this JSON file")
    args = parser.parse_args()
    wanted, found = set(args.names), []
    chosen = [m for m in mutants() if not wanted or wanted & {m.name, m.test}]
    if not chosen:
        parser.error(f"no mutant is called {' or '.join(wanted)}; tests/mutations/ has them all")
    for verdict in verdicts(chosen):
        found.append(verdict)
        outcome = f"{verdict.caught_by}: {verdict.how}" if verdict.caught_by else "SURVIVES"
        print(f"{verdict.file} {verdict.function}: {verdict.name}: {outcome}", flush=True)
    caught = sum(bool(verdict.caught_by) for verdict in found)
    print(f"{caught} of {len(found)} mutants caught")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"commit": commit(), "verdicts": [verdict._asdict() for verdict in found]}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if caught == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
