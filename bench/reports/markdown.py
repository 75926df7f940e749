"""Records as Markdown: one table per bench."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.harness import roofline
from bench.harness.record import Record

Row = dict[str, Any]
Cell = Callable[[Row], str]
HOW = ("rounds", "steps", "order")  # settings that say how a measurement was taken


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def name(row: Row) -> str:
    return ", ".join(str(row[key]) for key in ("op", "direction", "variant") if key in row)


def heading(run: Record) -> str:
    """What was measured, without how."""
    settings = {k: v for k, v in run["settings"].items() if k not in HOW}
    return ", ".join(str(v) if k in ("size", "dtype") else f"{k}={v}" for k, v in settings.items())


def how(run: Record) -> str:
    settings = run["settings"]
    return ", ".join(f"{key}: {settings[key]}" for key in HOW if key in settings)


def cells(run: Record) -> tuple[list[str], list[list[str]]]:
    """The header, and a line of cells for every row of a record that has figures."""
    columns = COLUMNS.get(run["bench"], OTHERWISE)
    timed = [row for row in run["rows"] if "problem" not in row]
    return list(columns), [[cell(row) for cell in columns.values()] for row in timed]


def figures(run: Record) -> str:
    return table(*cells(run))


def _field(name: str, form: str, scale: float = 1.0) -> Cell:
    return lambda row: number(row.get(name), form, scale)


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """Blank for what is missing or NaN."""
    return "" if value is None or value != value else format(scale * value, form)


def _p10_to_p90(row: Row) -> str:
    return "{p10:,.2f} to {p90:,.2f}".format(**row["ms"]) if "ms" in row else ""


def _first_token(row: Row) -> str:
    samples = row.get("first_token_seconds")
    return number(statistics.median(samples), ",.1f", 1e3) if samples else ""


def rate(row: Row) -> str:
    if row.get("flops"):
        return f"{row['teraflops_per_second']:.3g} TFLOP/s"
    return f"{row['gigabytes_per_second']:,.1f} GB/s"


def variant(row: Row) -> str:
    """Its name; "(!)" where the figures are to be doubted: the row's "flag" says why."""
    return f"{row['variant']} (!)" if "flag" in row else row["variant"]


OTHERWISE: dict[str, Cell] = {
    "variant": variant,
    "x eager": _field("over_eager", ".2f"),
}
COLUMNS: dict[str, dict[str, Cell]] = {
    "train": {
        "variant": variant,
        "tokens/s": _field("tokens_per_second", ",.0f"),
        "x eager": _field("over_eager", ".2f"),
        "ms/step": lambda row: number(row.get("ms", {}).get("median"), ",.2f"),
        "p10 to p90": _p10_to_p90,
        "MFU": _field("mfu", ".1%"),
        "of matmul ceiling": _field("of_matmul_ceiling", ".1%"),
        "peak GiB": _field("peak_bytes", ".2f", 2**-30),
        "first step s": _field("first_step_seconds", ".1f"),
        "final loss": _field("final_loss", ".4f"),
        "attention": lambda row: str(row.get("attention") or ""),
    },
    "decode": {
        "variant": variant,
        "tokens/s": _field("tokens_per_second", ",.1f"),
        "x eager": _field("over_eager", ".2f"),
        "x nanogpt": _field("over_nanogpt", ".2f"),
        "of bandwidth floor": _field("of_floor", ".1%"),
        "first token ms": _first_token,
    },
    "memory": {
        "variant": variant,
        "peak GiB": _field("peak_bytes", ".2f", 2**-30),
        "x eager's": _field("over_eager", ".2f"),
    },
    "curves": {
        "variant": variant,
        "final loss": _field("final_loss", ".4f"),
        "gap to the first": _field("gap", ".5f"),
        "of a seed's gap": _field("of_a_seed", ".3f"),
    },
    "ops": {
        "op": lambda row: row["op"],
        "direction": lambda row: row["direction"],
        "variant": variant,
        "us": _field("microseconds", ",.1f"),
        "x eager": _field("over_eager", ".2f"),
        "rate": rate,
        "of ceiling": _field("of_ceiling", ".1%"),
    },
}


def describe(ceilings: roofline.Ceilings) -> str:
    flops, bandwidth = ceilings.flops / 1e12, ceilings.bandwidth / 1e9
    return f"{flops:.3g} TFLOP/s, {bandwidth:,.4g} GB/s ({ceilings.source})"


def ceilings_of(run: Record, records: Sequence[Record]) -> roofline.Ceilings | None:
    """Of the run, else its matmul ceiling with the last copy measured on the device, else those
    known of the device; None where nothing is known."""
    if "ceilings" in run:
        return roofline.Ceilings(**run["ceilings"])
    device = run["environment"]["device"]
    copies = [r for r in records if r["environment"]["device"] == device and _bandwidth(r)]
    if run.get("matmul_ceiling") and copies:
        source = f"matmul measured in this run, copy on {copies[-1]['date'][:10]}"
        return roofline.Ceilings(run["matmul_ceiling"], _bandwidth(copies[-1]), source)
    sixteen_bits = run["settings"].get("dtype") in ("bfloat16", "float16")
    return roofline.KNOWN.get(device) if sixteen_bits else None


def _bandwidth(run: Record) -> float:
    return run.get("copy_ceiling") or run.get("ceilings", {}).get("bandwidth", 0.0)


def step_floor(run: Record, records: Sequence[Record]) -> dict[str, float]:
    """Seconds per group of a training step under which nothing gets; empty if not known."""
    ceilings, settings = ceilings_of(run, records), run["settings"]
    if ceilings is None or settings.get("size") not in roofline.SIZES:
        return {}
    shape = roofline.shape_of(settings["size"], settings["B"], settings["T"], settings["dtype"])
    return roofline.by_group(list(roofline.training_step(shape)), ceilings)


def limits(run: Record, records: Sequence[Record]) -> str:
    """What the figures are held against, in a sentence; empty where that is not known."""
    if run["bench"] == "decode" and "floor_seconds" in run:
        floor, read = run["floor_seconds"], run.get("read_ceiling")
        bandwidth = f"{(read or run['copy_ceiling']) / 1e9:,.4g} GB/s"
        return f"Floor: {1e3 * floor:.3g} ms a token at {bandwidth}{'' if read else ' (a copy)'}."
    ceilings = ceilings_of(run, records)
    if ceilings is None or run["bench"] not in ("train", "ops"):
        return ""
    text = f"Ceilings: {describe(ceilings)}."
    floors = step_floor(run, records)
    if not floors:
        return text
    total = sum(floors.values())
    tokens = run["settings"]["B"] * run["settings"]["T"] / total
    groups = ", ".join(f"{group} {1e3 * seconds:,.2f}" for group, seconds in floors.items())
    return (
        f"{text} Floor of a step: {1e3 * total:,.2f} ms, {tokens:,.0f} tokens/s. In ms: {groups}."
    )
