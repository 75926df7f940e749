"""docs/performance.md, its pictures, and the README's table and picture, from the records alone.

`make bench-report` writes them; a test holds the committed texts against the committed records. Of
each device, bench and settings the newest record is shown, with its date. What was never measured
stays blank.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import machine, record
from bench.harness.record import Record
from bench.reports import markdown, pictures

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- performance: made by make bench-report -->", "<!-- end -->"
# What the README has a row for, measured or not. The last ones suit a CPU.
Wanted = tuple[Any, ...]
TRAINED: list[Wanted] = [  # size, B, T, dtype
    ("124M", 16, 1024, "bfloat16"),
    ("124M", 4, 1024, "bfloat16"),
    ("350M", 16, 1024, "bfloat16"),
    ("774M", 16, 1024, "bfloat16"),
    ("1.5B", 16, 1024, "bfloat16"),
    ("124M", 2, 256, "float32"),
    ("124M", 2, 256, "bfloat16"),
    ("char", 12, 64, "float32"),
    ("char", 12, 64, "bfloat16"),
    ("char-384", 16, 256, "float32"),
]
SHOWN = {
    "training": ("nanogpt", "nanogpt-compile", "liger-fused", "fastgpt"),
    "decoding": ("nanogpt", "hf"),
}
DECODED: list[Wanted] = [("124M", "bfloat16", None), ("124M", "float32", None)]  # no batch
HEAD = """# Performance

Made by `make bench-report` from the records under [bench/results](../bench/results): change nothing
here by hand. [bench/README.md](../bench/README.md) says how times are taken. `x eager` is the
median over rounds of eager PyTorch's time over the variant's in the same round.
"""


def latest(records: Sequence[Record]) -> list[Record]:
    """The newest record of each device, bench and settings, in the order they were first taken."""
    newest = {record.kind(run): run for run in records}
    return list(newest.values())


def by_device(records: Sequence[Record]) -> dict[str, list[Record]]:
    """GPUs first; a CPU is what everybody has."""
    devices: dict[str, list[Record]] = {}
    for run in latest(records):
        devices.setdefault(run["environment"]["device"], []).append(run)
    return dict(sorted(devices.items(), key=lambda item: (item[0].startswith("CPU"), item[0])))


def readme(records: Sequence[Record]) -> str:
    """A row per run that users ask about and device it was measured on: training, then decoding.

    Ratios are shown of quiet machines only; what nobody measured is named below the tables.
    """
    trained, no_training = _rows(records, "train", ("size", "B", "T", "dtype"), TRAINED,
                                 "{}, B={}, T={}, {}")  # fmt: skip
    decoded, no_decoding = _rows(records, "decode", ("size", "dtype", "batch"), DECODED,
                                  "{}, batch 1, {}")  # fmt: skip
    parts = [_summary("training", trained), _summary("decoding", decoded)]
    for what, names in (("training", no_training), ("decoding", no_decoding)):
        if names:
            parts.append(f"Not measured yet, {what}: {'; '.join(names)}.")
    return "\n\n".join(part for part in parts if part)


def _rows(
    records: Sequence[Record], bench: str, keys: Sequence[str], wanted: list[Wanted], name: str
) -> tuple[list[tuple[str, Record]], list[str]]:
    """(name, record), once per device, and the names of what no device has measured."""
    runs = [r for rs in by_device(records).values() for r in rs if r["bench"] == bench]
    rows: list[tuple[str, Record]] = []
    missing: list[str] = []
    for settings in wanted:
        same = [r for r in runs if tuple(r["settings"].get(k) for k in keys) == settings]
        rows += [(name.format(*settings), r) for r in same]
        missing += [] if same else [name.format(*settings)]
    return rows, missing


def _summary(what: str, rows: list[tuple[str, Record]]) -> str:
    if not rows:
        return ""
    header = [f"{what}, tokens/s", *SHOWN[what], "fastgpt, fastest", "device", "date"]
    return markdown.table(header, [[name, *_cells(run, SHOWN[what])] for name, run in rows])


def _cells(run: Record, shown: Sequence[str]) -> list[str]:
    rows = {row["variant"]: row for row in run["rows"] if _timed(row)}
    fastgpt_rows = [
        row for name, row in rows.items() if name.startswith("fastgpt") and "flag" not in row
    ]
    quiet = not ("machine" in run and machine.warning(run["machine"]))
    fastest = ""
    if fastgpt_rows:
        best = max(fastgpt_rows, key=lambda row: row["tokens_per_second"])
        fastest = f"{_tokens(best, quiet)} {best['variant']}"
    cells = [_tokens(rows[name], quiet) if name in rows else "" for name in shown]
    return [*cells, fastest, run["environment"]["device"], run["date"][:10]]


def _tokens(row: dict[str, Any], quiet: bool) -> str:
    ratio = f" ({row['over_eager']:.2f})" if quiet and row.get("over_eager") else ""
    rate = row["tokens_per_second"]
    doubt = " (!)" if "flag" in row else ""  # docs/performance.md says why
    return f"{rate:{',.0f' if rate >= 100 else '.1f'}}{ratio}{doubt}"


def _timed(row: dict[str, Any]) -> bool:
    return bool(row.get("tokens_per_second")) and "problem" not in row


def document(records: Sequence[Record]) -> str:
    """docs/performance.md."""
    parts = [HEAD]
    for device, runs in by_device(records).items():
        parts.append(f"## {device}\n")
        parts += [f"![{p.title}]({p.name})\n" for p in pictures.of_device(runs)]
        for run in runs:
            parts += _section(run, records)
    if not records:
        parts.append("No record has been taken yet.\n")
    return "\n".join(parts)


def _section(run: Record, records: Sequence[Record]) -> Iterator[str]:
    yield f"### {run['bench']}: {markdown.heading(run)}\n"
    env = run["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton") if name in env)
    how = markdown.how(run)
    yield f"{run['date'][:10]}, commit {run['commit'][:9]}, {versions}{how and '; '}{how}.\n"
    if text := machine.warning(run["machine"]) if "machine" in run else "":
        yield f"{text[0].upper()}{text[1:]}.\n"
    yield markdown.figures(run) + "\n"
    if limits := markdown.limits(run, records):
        yield limits + "\n"
    if doubted := [row for row in run["rows"] if "flag" in row and "problem" not in row]:
        yield "To be doubted:\n"
        yield "\n".join(f"- {markdown.name(row)}: {row['flag']}" for row in doubted) + "\n"
    refused = [row for row in run["rows"] if "problem" in row]
    if refused:
        yield "Without a time:\n"
        yield "\n".join(f"- {markdown.name(row)}: {row['problem']}" for row in refused) + "\n"


def headline(records: Sequence[Record]) -> pictures.Picture | None:
    """The README's picture: of the first of TRAINED that was measured, on a GPU if on any."""
    keys = ("size", "B", "T", "dtype")
    runs = [run for _, run in _rows(records, "train", keys, TRAINED, "{}")[0]]
    runs.sort(key=lambda run: run["environment"]["device"].startswith("CPU"))
    return pictures.headline(runs[0]) if runs else None


def replace_between(text: str, table: str) -> str:
    """`text` with `table` between the two markers. ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md needs the lines {BEGIN} and {END} around its table")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reports.document", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of records")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs/")
    args = parser.parse_args()
    readme_path, docs = args.root / "README.md", args.root / "docs"
    try:
        records = record.load_all(args.results)
        text = replace_between(readme_path.read_text(), readme(records))
    except ValueError as error:
        parser.error(str(error))
    readme_path.write_text(text)
    docs.mkdir(exist_ok=True)
    (docs / "performance.md").write_text(document(records))
    print(f"{docs / 'performance.md'} and {readme_path} from {len(records)} records")
    for runs in by_device(records).values():
        for picture in pictures.of_device(runs):
            picture.draw(docs / picture.name, records)
            print(docs / picture.name)
    if (first := headline(records)) is not None:
        first.draw(docs / first.name, records)
        print(docs / first.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
