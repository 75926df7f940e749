"""Records as pictures (PNG). matplotlib is imported only when one is drawn."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import curves
from bench.harness import machine, record
from bench.harness.record import Record
from bench.reports import markdown

Records = Sequence[Record]
LABELS = {  # of variants, for readers who do not know their names
    "eager": "the same model in eager PyTorch",
    "compile": "the same model, torch.compile",
    "nanogpt": "nanoGPT",
    "nanogpt-compile": "nanoGPT, torch.compile",
    "hf": "transformers",
    "liger": "nanoGPT with Liger's kernels",
    "liger-fused": "nanoGPT with Liger's fused loss",
    "fastgpt": "fastgpt",
    "fastgpt-nologits": "fastgpt, return_logits=False",
    "fastgpt-compile": "fastgpt, torch.compile",
    "fastgpt-step": "fastgpt.TrainStep",
    "fastgpt-step-graph": "fastgpt.TrainStep, capture=True",
    "fastgpt-step-overlap": "fastgpt.TrainStep, overlap=True",
}


class Picture(NamedTuple):
    name: str  # of the file
    title: str  # names the device: a CPU's says CPU
    draw: Callable[[Path, Records], None]  # to this file; all records, for their ceilings


def of_device(records: Records) -> list[Picture]:
    """The pictures that these records of one device have data for."""
    device = records[0]["environment"]["device"]
    trained = [r for r in records if r["bench"] == "train" and _timed(r)]
    measured = [r for r in records if any(row.get("peak_bytes") for row in _timed(r))]
    ops = [r for r in records if r["bench"] == "ops" and any("of_ceiling" in x for x in _timed(r))]
    trained_long = [r for r in records if r["bench"] == "curves" and _timed(r)]
    wanted: list[tuple[str, str, Callable[..., None], Records]] = [
        ("tokens", "Training tokens/s", _draw_tokens, trained),
        ("memory", "Peak memory of training, GiB", _draw_memory, measured),
        ("roofline", "Ops: share of what the roofline allows", _draw_roofline, ops),
        ("curves", f"Training loss, mean of {curves.SMOOTH} steps", _draw_curves, trained_long),
    ]
    pictures = []
    for what, says, draw, runs in wanted:
        if runs:
            title = f"{says} on {device}"
            name = f"performance-{record.slug(device)}-{what}.png"
            pictures.append(Picture(name, title, partial(draw, title, runs)))
    return pictures


def headline(run: Record) -> Picture:
    """One run's tokens/s, slowest first."""
    device, date = run["environment"]["device"], run["date"][:10]
    title = f"Training tokens/s on {device}, {date}"
    return Picture("tokens.png", title, partial(_draw_headline, title, run))


def _draw_headline(title: str, run: Record, path: Path, records: Records) -> None:
    rows = sorted(_timed(run), key=lambda row: row["tokens_per_second"])
    doubt = any("flag" in row for row in rows)
    rows = [row | {"variant": _label(row)} for row in rows]
    figure_class, canvas = _matplotlib()
    figure = figure_class(figsize=(8.0, 1.2 + 0.32 * len(rows)), layout="constrained")
    canvas(figure)
    figure.suptitle(title)
    axes = figure.subplots()
    _bars(axes, rows, lambda row: row["tokens_per_second"], ",.0f")
    noisy = "machine" in run and machine.warning(run["machine"])
    notes = [markdown.heading(run), *(["the machine was not quiet"] if noisy else [])]
    notes += ["(!): losses to be doubted, docs/performance.md"] if doubt else []
    axes.set_xlabel("; ".join(notes), fontsize=8)
    axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _label(row: dict[str, Any]) -> str:
    name = LABELS.get(row["variant"], row["variant"])
    return f"{name} (!)" if "flag" in row else name


def _timed(run: Record) -> list[dict[str, Any]]:
    return [row for row in run["rows"] if "problem" not in row]


def _draw_tokens(title: str, runs: Records, path: Path, records: Records) -> None:
    def panel(axes: Any, run: Record) -> None:
        _bars(axes, _timed(run), lambda row: row["tokens_per_second"], ",.0f")
        floor = sum(markdown.step_floor(run, records).values())
        if floor:
            most = run["settings"]["B"] * run["settings"]["T"] / floor
            axes.axvline(most, color="black", linestyle="--")
            axes.set_xlabel(f"tokens/s; dashed: {most:,.0f}, the roofline's limit")

    _panels(title, runs, panel, path)


def _draw_memory(title: str, runs: Records, path: Path, records: Records) -> None:
    def panel(axes: Any, run: Record) -> None:
        rows = [row for row in _timed(run) if row.get("peak_bytes")]
        _bars(axes, rows, lambda row: row["peak_bytes"] / 2**30, ".2f")
        axes.set_xlabel("GiB")

    _panels(title, runs, panel, path)


def _draw_roofline(title: str, runs: Records, path: Path, records: Records) -> None:
    def panel(axes: Any, run: Record) -> None:
        rows = [row for row in _timed(run) if "of_ceiling" in row]
        names = list(dict.fromkeys(f"{row['op']}, {row['direction']}" for row in rows))
        markers = itertools.cycle("ovs^Dx+*P")
        for variant, marker in zip(
            dict.fromkeys(r["variant"] for r in rows), markers, strict=False
        ):
            own = [row for row in rows if row["variant"] == variant]
            places = [names.index(f"{row['op']}, {row['direction']}") for row in own]
            axes.plot([row["of_ceiling"] for row in own], places, marker, label=variant)
        axes.axvline(1, color="black", linestyle="--")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.05, *(row["of_ceiling"] for row in rows)))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.1))
        axes.set_xlabel("time that the measured ceilings allow / time taken")

    _panels(title, runs, panel, path, height=7.0, columns=1)


def _draw_curves(title: str, runs: Records, path: Path, records: Records) -> None:
    def panel(axes: Any, run: Record) -> None:
        for row in _timed(run):
            losses = curves.smooth(row["losses"])
            share = f", {row['of_a_seed']:.2g} of a seed's gap" if "of_a_seed" in row else ""
            style = "--" if "seed" in row["variant"] else "-"
            steps = range(len(row["losses"]) - len(losses), len(row["losses"]))
            axes.plot(steps, losses, style, linewidth=1, label=row["variant"] + share)
        axes.set_xlabel("step")
        axes.legend(fontsize=8)

    _panels(title, runs, panel, path, height=4.0)


def _bars(axes: Any, rows: list[dict[str, Any]], value: Callable[..., float], form: str) -> None:
    """fastgpt's own in another colour, each with its figure."""
    names, values = [row["variant"] for row in rows], [value(row) for row in rows]
    colours = ["C1" if name.startswith("fastgpt") else "C0" for name in names]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, [format(v, form) for v in values], padding=2, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)


def _panels(
    title: str,
    runs: Records,
    panel: Callable[[Any, Record], None],
    path: Path,
    height: float = 3.0,
    columns: int = 2,
) -> None:
    """One panel per run, named by its settings and date, below the title."""
    figure_class, canvas = _matplotlib()
    columns = min(columns, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = figure_class(figsize=(7.0 * columns, height * rows + 0.5), layout="constrained")
    canvas(figure)
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, run in itertools.zip_longest(grid.flat, runs):
        if run is None:
            axes.set_visible(False)
            continue
        caption = f"{run['bench']}: {markdown.heading(run)}\n"
        caption += f"{run['date'][:10]}, commit {run['commit'][:9]}"
        axes.set_title(caption, fontsize=8)
        axes.tick_params(labelsize=8)
        panel(axes, run)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"pictures need matplotlib ({error}): pip install matplotlib") from None
    return Figure, FigureCanvasAgg
