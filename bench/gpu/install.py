"""`python -m bench.gpu --install DIR`: installs the results of GPU sessions in this checkout.

    records       into bench/results/<device>/; of records with equal settings the fullest one
    tuned.json    as the device's entry of kernels/tuned.json, which dispatch and launches follow
    the docs      made anew from all records (bench.reports.document)

Everything is checked before anything is written. If a file is wrong, it is named and nothing is
installed; if a write fails, the files that were written are put back.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu import results, store
from bench.gpu.stages import REAL
from bench.harness import record
from fastgpt import backend
from fastgpt.kernels import _tuned

ROOT = Path(__file__).parents[2]
_TRAINING = {"size": REAL["size"], "T": REAL["T"]}
BENCHES: dict[str, dict[str, Any]] = {  # and what a session's records have among their settings
    "train": _TRAINING,
    "curves": _TRAINING,
    "ops": {"M": REAL["tokens"], "V": REAL["vocabulary"]},
    "decode": {"size": REAL["size"], "prompt": REAL["prompt"], "new_tokens": REAL["new"]},
}
Record = record.Record


class Refused(ValueError):
    """The message names the file, what is wrong with it, and what to do."""


def main(folder: Path, root: Path = ROOT) -> int:
    try:
        files = _contents(folder, root)
    except ValueError as error:
        print(f"refused, nothing was installed: {error}", file=sys.stderr)
        return 2
    docs = [root / "README.md", *(root / "docs").glob("*")]
    before = {path: path.read_bytes() for path in docs if path.is_file()}
    before |= {path: path.read_bytes() if path.exists() else None for path in files}  # type: ignore[misc]
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            store.write(path, content)
            print(path.relative_to(root))
        command = [sys.executable, "-m", "bench.reports.document"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the docs could not be made: {done.stderr[-1000:]}")
    except BaseException as error:
        for doc in (root / "docs").glob("*"):
            if doc.is_file() and doc not in before:
                doc.unlink()
        for path, content_before in before.items():
            if content_before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content_before)
        print(f"nothing was installed: {error}", file=sys.stderr)
        if isinstance(error, OSError | RuntimeError):
            return 1
        raise
    print(done.stdout, end="")
    return 0


def _contents(folder: Path, root: Path) -> dict[Path, bytes]:
    """path -> the content to write there. ValueError if a file of the folder is wrong."""
    for name in (store.STATE, store.TAR):
        if not (folder / name).is_file():
            raise Refused(f"{folder / name} is missing: DIR is what --out of bench.gpu named")
    state = store.read(folder / store.STATE)
    if state["rehearsal"]:
        raise Refused(f"{folder / store.STATE} is of a rehearsal on toy sizes, not of a GPU")
    records = [
        checked(content, f"{folder / store.TAR}:{name}")
        for name, content in store.members(folder / store.TAR)
        if "records" in Path(name).parts and name.endswith(".json")
    ]
    if not records:
        raise Refused(f"{folder / store.TAR} holds no record")
    packed = {name for name, _ in store.members(folder / store.TAR)}
    for name, entry in state["stages"].items():
        for one in entry.get("results", {}).get("records", []):
            if f"{name}/{one['file']}" not in packed:
                print(f"{name}/{one['file']} is not in {store.TAR}, but in that of an earlier call",
                      file=sys.stderr)  # fmt: skip
    doubts = results.flags(state)
    files = dict(_placed(best(merged(records)), doubts, root))
    if (path := folder / store.TUNED).exists():
        device = str(state["stages"].get("tune", {}).get("device", ""))
        files[root / "kernels/tuned.json"] = _shipped(path, device, root)
    return files


def checked(content: bytes, name: str) -> Record:
    """The record in `content`. Refused unless it was measured on a GPU, at a session's sizes."""
    try:
        run = json.loads(content)
    except ValueError as error:
        raise Refused(f"{name} is not JSON: {error}") from None
    kinds = {"bench": str, "date": str, "commit": str, "environment": dict, "settings": dict}
    kinds["rows"] = list
    wrong = [k for k, kind in kinds.items()
             if not isinstance(run, dict) or not isinstance(run.get(k), kind)]  # fmt: skip
    if wrong or run.get("schema") != record.SCHEMA or run["bench"] not in BENCHES:
        raise Refused(f"{name} is not a record of {', '.join(BENCHES)}: {wrong or run!r:.80}")
    device = run["environment"].get("device")
    if not isinstance(device, str) or device.startswith("CPU"):
        raise Refused(f"{name} was measured on {device!r}, which is no GPU")
    if not BENCHES[run["bench"]].items() <= run["settings"].items():
        raise Refused(f"{name} has settings {run['settings']}, which are not a session's")
    for row in run["rows"]:
        if not isinstance(row, dict) or not isinstance(row.get("variant"), str):
            raise Refused(f"{name} has the row {row!r:.80}, which names no variant")
        samples = row.get("seconds", [])
        if not isinstance(samples, list) or not all(map(_positive, samples)):
            raise Refused(f"{name}: seconds of {row['variant']} are not all above 0")
    return run


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def merged(records: list[Record]) -> list[Record]:
    """The records, those of single ops put together in one, as bench.ops writes it."""
    rest: list[Record] = []
    together: dict[str, Record] = {}
    for run in sorted(records, key=lambda r: r["date"]):
        if run["bench"] != "ops":
            rest.append(run)
            continue
        settings = {k: v for k, v in run["settings"].items() if k != "only"}
        whole = {**run, "settings": settings}
        into = together.setdefault(record.kind(whole), {**whole, "rows": []})
        into["rows"] += [row for row in run["rows"] if _key(row) not in map(_key, into["rows"])]
    return rest + list(together.values())


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "direction", "variant"))


def best(records: list[Record]) -> list[Record]:
    """Of records with equal settings the one with most times, of several the newest."""

    def times(run: Record) -> tuple[int, str]:
        return sum("problem" not in row for row in run["rows"]), run["date"]

    chosen: dict[str, Record] = {}
    for run in sorted(records, key=times):
        chosen[record.kind(run)] = run
    return list(chosen.values())


def _placed(
    records: list[Record], doubts: dict[str, str], root: Path
) -> Iterator[tuple[Path, bytes]]:
    """Paths and contents of new records; rows of an op that failed the GPU suite get a flag."""
    taken: set[Path] = set()
    for run in records:
        for row in run["rows"]:
            if test := results.flagged(row, doubts):
                also = f"; {row['flag']}" if "flag" in row else ""
                row["flag"] = f"the GPU suite failed: {test}{also}"
        content = (json.dumps(run, indent=1) + "\n").encode()
        path = record.path_of(run, root / "bench/results")
        while path in taken:  # two records of one second
            path = path.with_stem(f"{path.stem}-too")
        taken.add(path)
        if content not in (other.read_bytes() for other in path.parent.glob("*.json")):
            yield path, content


def _shipped(path: Path, device: str, root: Path) -> bytes:
    """kernels/tuned.json with the device's new entry."""
    try:
        entry = json.loads(path.read_bytes())
    except ValueError as error:
        raise Refused(f"{path} is not JSON: {error}") from None
    if not device or device.startswith(("CPU", "unknown")):
        raise Refused(f"{path} was measured on {device!r}, which is no GPU")
    try:
        _tuned.checked(entry)
    except ValueError as error:
        raise Refused(f"{path} is {error}") from None
    for op, name in entry["implementations"].items():
        if op not in backend.OPS or name not in (*backend.OPS[op].implementations, "torch"):
            raise Refused(f"{path} chooses {name!r} for {op!r}, which this checkout does not know")
    for kernel, config in entry["configs"].items():
        tiles = config if isinstance(config, list) else [config]
        if not tiles or not all(isinstance(t, dict) and _integers(t) for t in tiles):
            raise Refused(f"{path} has the configuration {config!r:.60} of {kernel!r}")
    shipped = root / "kernels/tuned.json"
    entries = json.loads(shipped.read_text())
    entries[device] = _tuned.joined(entries.get(device, {}), entry)
    return (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode()


def _integers(tile: dict[str, Any]) -> bool:
    return bool(tile) and all(isinstance(value, int) for value in tile.values())
