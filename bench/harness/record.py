"""A benchmark run as a JSON record: what ran, where, when, from which commit, with every sample.

    schema       the version of this layout: SCHEMA
    bench        "train", "decode", "memory", "ops" or "curves"
    date         ISO 8601, UTC
    environment  device and versions (fastgpt.environment.versions)
    commit       of the checkout; "-dirty" where files differed from it
    settings     what was asked for: sizes, dtype, rounds
    gpu          clocks, temperature and power before and after the run (nvidia_smi.py); empty
                 without nvidia-smi, and without "after" where the run was ended early
    machine      load and spread of the host's speed before the run (machine.py); not of all benches
    rows         one per variant (and op, and direction): "variant" and either "problem", why it has
                 no figures, or the figures, such as "seconds", a list with one sample per round;
                 "flag" beside the figures is why they are to be doubted

Records lie in bench/results/<device>/, one file per run; runs only ever add files. What is shown
(tables, pictures, the README) is computed from them.
"""

import datetime
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from bench.harness import nvidia_smi
from fastgpt.environment import versions
from fastgpt.storage import files

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"
Record = dict[str, Any]


def new(
    bench: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    gpu: dict[str, nvidia_smi.Reading],
    **more: Any,
) -> Record:
    return {
        "schema": SCHEMA,
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": versions(),
        "commit": commit(),
        "settings": settings,
        "gpu": gpu,
        **more,
        "rows": rows,
    }


def path_of(record: Record, results: Path = RESULTS) -> Path:
    """results/<device>/<bench>-<date>.json, or the next name that is free: none is overwritten."""
    stem = f"{record['bench']}-{re.sub('[^0-9T]', '', record['date'][:19])}"
    folder = results / slug(record["environment"]["device"])
    paths = (folder / f"{stem}{f'-{n}' if n else ''}.json" for n in range(10**6))
    return next(p for p in paths if not p.exists())


def save(record: Record, results: Path = RESULTS) -> Path:
    """Write it to its path, which is returned."""
    path = path_of(record, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(record, path)
    return path


def write(record: Record, path: Path) -> None:
    """In one step: whatever ends this process leaves all of the file's last content, or the new."""
    files.write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


def load(path: Path) -> Record:
    """ValueError if it is not a record, or one of another schema."""
    try:
        record = json.loads(path.read_text())
        schema = record["schema"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a benchmark record: {error!r}") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, this checkout reads {SCHEMA}; "
            "compare it with the checkout of its commit, or move it away"
        )
    return record


def load_all(results: Path = RESULTS) -> list[Record]:
    """Every record, oldest first; those of one second by their names."""
    return sorted(map(load, sorted(results.glob("*/*.json"))), key=lambda r: r["date"])


def kind(record: Record) -> str:
    """What may be compared: two records alike in device, bench and settings."""
    device = record["environment"]["device"]
    return json.dumps([device, record["bench"], record["settings"]], sort_keys=True)


def slug(device: str) -> str:
    """A device's name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str:
    """FASTGPT_COMMIT, by which a copy sent to another machine is told its commit; else git's, with
    "-dirty" where files have changed since."""
    if told := os.environ.get("FASTGPT_COMMIT"):
        return told
    here = Path(__file__).parents[2]

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return (head or "unknown") + ("-dirty" if dirty else "")
