"""Reads what a stage has written. It may have been stopped at any point, so nothing is trusted.

records    {out}/**/*.json that are records of bench (record.py)
rows       lines of its output that are JSON objects
tests      {out}/outcomes-*.jsonl of tests.gpu: how each test ended
tuned      the file of `fastgpt tune`
last       the last lines that it printed
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu import store

MAX_ROWS, MAX_RECORDS, MAX_LINE = 400, 8, 4000  # of one stage; characters of one row
MAX_BYTES = 2**26  # read of one file
Row = dict[str, Any]
FAILED = ("failed", "crashed", "hung")
LOG = "log.txt"


def collect(out: Path) -> dict[str, Any]:
    """Everything in a stage's folder, small enough for the state."""
    results: dict[str, Any] = {}
    log = _text(out / LOG)
    if records := list(_records(out)):
        results["records"] = records[-MAX_RECORDS:]
    if rows := _newest(_rows(log.splitlines())):
        results["rows"] = rows[:MAX_ROWS]
    if tests := _tests(out):
        results["tests"] = tests
    for path in sorted(out.glob("cache/fastgpt/*.json")):
        if isinstance(entry := _parsed(_text(path)), dict):
            results["tuned"] = entry
    if step := re.findall(r"^(?:step|gaps) .*$", log, re.MULTILINE):  # of bench.profiler
        results["profile"] = [line[:100] for line in step[-2:]]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    results["last"] = [printable(line)[:300] for line in lines[-3:]]
    return results


def joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The results of two tries: the second's, and those of the first that the second has not
    measured, or that lie on another machine."""
    files = {record["file"] for record in after.get("records", [])}
    old = [record for record in before.get("records", []) if record["file"] not in files]
    both = {**before, **after}
    return both | ({"records": old + after.get("records", [])} if "records" in both else {})


def wrote_something(results: dict[str, Any]) -> bool:
    return bool(results.keys() - {"last"})


def printable(text: str) -> str:
    """`text` with a question mark for each character that a terminal may not show."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _parsed(text: str) -> Any:
    def number(digits: str) -> int | float:
        return int(digits) if len(digits) < 16 else float(digits)  # long ints cannot be printed

    try:
        return json.loads(text, parse_int=number)
    except (ValueError, RecursionError):
        return None


def _rows(lines: list[str]) -> list[Row]:
    parsed = (_parsed(line) for line in lines if line.startswith("{") and len(line) < MAX_LINE)
    return [_short(row) for row in parsed if isinstance(row, dict)]


def _newest(rows: list[Row]) -> list[Row]:
    """The last row of each check, op, direction and variant: a second try prints them again."""
    names = ("check", "op", "direction", "variant")
    return list({str([row.get(name) for name in names]): row for row in rows}.values())


def _records(out: Path) -> Iterator[dict[str, Any]]:
    """A stage's records without their samples, which stay in the tar."""
    for path in sorted(out.glob("**/*.json")):
        record = _parsed(_text(path))
        if not (isinstance(record, dict) and isinstance(record.get("rows"), list)):
            continue
        rows = [row for row in record["rows"] if isinstance(row, dict)]
        short = [_short(row) for row in rows]
        of_all = {k: record.get(k) for k in ("bench", "date", "settings", "matmul_ceiling")}
        yield {**of_all, "file": path.relative_to(out).as_posix(), "rows": short[:MAX_ROWS]}


def _short(row: Row) -> Row:
    """A row without its samples, and with long texts cut."""
    plain = {name: value for name, value in row.items() if not isinstance(value, list | dict)}
    if isinstance(ms := row.get("ms"), dict):
        plain["ms"] = {"median": ms.get("median")}
    return {name: v[:300] if isinstance(v, str) else v for name, v in plain.items()}


def _tests(out: Path) -> dict[str, Any]:
    """How many tests ended in which way, and those that failed: a test's last line counts."""
    last: dict[str, Row] = {}
    for path in sorted(out.glob("outcomes-*.jsonl")):
        for row in _rows(_text(path).splitlines()):
            if isinstance(row.get("test"), str):
                last[row["test"]] = row
    counts: dict[str, int] = {}
    for row in last.values():
        outcome = str(row.get("outcome"))
        counts[outcome] = counts.get(outcome, 0) + 1
    bad = [row for row in last.values() if row.get("outcome") in FAILED]
    return {"counts": counts, "bad": bad[:MAX_ROWS]} if last else {}


def flags(state: store.State) -> dict[str, str]:
    """op, or "model" -> a failed test of it. tests.gpu writes the ops that a test is marked for."""
    failed: dict[str, str] = {}
    for entry in state["stages"].values():
        tests = entry.get("results", {}).get("tests", {})
        for row in tests.get("bad", []):
            for op in str(row.get("ops") or "model").split():
                failed.setdefault(op, row["test"])
    return failed


def is_fastgpts(row: Row) -> bool:
    """Whether a row's variant runs fastgpt's code."""
    return str(row.get("variant")).startswith(("fastgpt", "own", "cuBLAS and", "specialized"))


def flagged(row: Row, doubts: dict[str, str]) -> str:
    """The failed test that puts the time of `row` in doubt, or "".

    Only fastgpt's own rows are doubted: those of an op by its tests, those of a model by any.
    """
    if not doubts or not is_fastgpts(row):
        return ""
    op = row.get("part_of") or row.get("op")
    return doubts.get(str(op), "") if op else next(iter(doubts.values()))
