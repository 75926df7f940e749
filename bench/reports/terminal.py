"""A record on the terminal: the columns of docs/performance.md, aligned."""

from collections.abc import Sequence

from bench.harness import machine
from bench.harness.record import Record
from bench.reports import markdown


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
        lines += ["", *_aligned(*markdown.cells(run))]
    for row in run["rows"]:
        if why := row.get("problem") or row.get("flag"):
            lines.append(f"{'- ' if 'problem' in row else '(!) '}{markdown.name(row)}: {why}")
    warning = machine.warning(run["machine"]) if "machine" in run else ""
    return "\n".join([*lines, *([warning] if warning else [])])


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text to the left, of figures to the right; columns without any are left out."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    padded = []
    for column in columns:
        width = max(map(len, column))
        figures = all(cell[:1].isdigit() for cell in column[1:] if cell)
        padded.append([cell.rjust(width) if figures else cell.ljust(width) for cell in column])
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
