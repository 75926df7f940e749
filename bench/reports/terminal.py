"""A record on the terminal: the columns of docs/performance.md, aligned, in 60 columns of text."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence

from bench.harness import machine
from bench.harness.record import Record
from bench.reports import markdown

WIDTH = 60


def text(run: Record) -> str:
    """What was measured, the figures, and why some are missing or to be doubted."""
    how = markdown.how(run)
    lines = [f"{run['environment']['device']}, {run['bench']}: {markdown.heading(run)}"]
    lines += [f"({how})"] if how else []
    if ceiling := run.get("matmul_ceiling"):
        lines.append(f"Matmul ceiling: {ceiling / 1e12:.3g} TFLOP/s.")
    if (limits := markdown.limits(run, [run])) != "":
        lines.append(limits)
    if any("problem" not in row for row in run["rows"]):
        lines += ["", *_tables(*markdown.cells(run))]
    for row in run["rows"]:
        if why := row.get("problem") or row.get("flag"):
            lines.append(f"{'- ' if 'problem' in row else '(!) '}{markdown.name(row)}: {why}")
    warning = machine.warning(run["machine"]) if "machine" in run else ""
    lines += [warning] if warning else []
    return "\n".join(part for line in lines for part in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """A table's lines are short enough: what is longer is prose."""
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else [line]


def _tables(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """One for all variants; where they are of several ops, one for each op and direction."""
    at = header.index("variant")
    for of, group in itertools.groupby(rows, key=lambda row: row[:at]):
        yield from [f"{', '.join(of)}:"] if of else []
        yield from _aligned(header[at:], [row[at:] for row in group])
        yield ""


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of text to the left, of figures to the right; columns without any are left out.

    What does not fit beside the first column goes below, beside that again.
    """
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    first, *others = [_padded(column) for column in columns]
    shown = [first]
    for column in others:
        if len(shown) > 1 and _width([*shown, column]) > WIDTH:
            yield from [*_lines(shown), ""]
            shown = [first]
        shown.append(column)
    yield from _lines(shown)


def _padded(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    figures = all(cell[:1].isdigit() for cell in column[1:] if cell)
    return [cell.rjust(width) if figures else cell.ljust(width) for cell in column]


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(len(column[0]) + 2 for column in columns) - 2


def _lines(columns: Sequence[Sequence[str]]) -> Iterator[str]:
    return ("  ".join(line).rstrip() for line in zip(*columns, strict=True))
