"""The history of a run: log.jsonl always, others by flag (other_logs.py), loss.png at the end.

The first line says which run it is and with which settings; then a line for each step and each
validation. A resumed run goes on in it, from the step of its checkpoint.
"""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgpt.storage import files
from fastgpt.storage.printable import first_line
from fastgpt.training.config import TrainConfig
from fastgpt.training.other_logs import OtherLogs

NAME = "log.jsonl"


class Log:
    def __init__(self, folder: Path, config: TrainConfig, step: int, run: str):
        """Goes on from `step` of `run`: its later lines, or those of another run, are removed."""
        self.path = folder / NAME
        self._others = OtherLogs(folder, config, step)
        past = [line for line in read(self.path) if line.get("step", 0) <= step] if step else []
        if past and past[0].get("run") != run:
            past = []
        self.run = run if past else secrets.token_hex(8)
        if not past:
            past = [{"run": self.run, "settings": asdict(config)}]
        files.write_bytes(self.path, "".join(map(_line, past)).encode())
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(self.path, flags), "a", encoding="utf-8")

    def add(self, step: int, **values: Any) -> None:
        self._write(_line({"step": step, **values}))
        self._others.add(step, values)

    def sync(self) -> None:
        """To disk, before a checkpoint: its history must last as long as it."""
        self._write("", last=True)

    def _write(self, text: str, last: bool = False) -> None:
        try:
            self._file.write(text)
            if last:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise files.explained(error, self.path, len(text)) from None

    def close(self) -> None:
        with suppress(OSError):  # which sync() has reported
            self._file.close()
        self._others.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: a killed run may have left half of one."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("step", 0), int):
                lines.append(line)
    return lines


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def draw(log: Path, picture: Path) -> str:
    """Write the loss curves of a log -> what to tell about it."""
    try:
        _plot(read(log), picture)
    except ImportError:
        return "no loss.png, which needs matplotlib; pip install 'fastgpt[plot]'"
    except Exception as error:  # of a backend, a font, a disk: the run is none the worse
        return f"no loss curves: {first_line(error)}"
    return f"loss curves: {picture}"


def _plot(lines: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, label, style in (
        ("loss", "training, each step", dict(linewidth=0.6, alpha=0.6)),
        ("train_loss", "training, at validations", dict(marker=".")),
        ("val_loss", "validation", dict(marker=".")),
    ):
        values = ((line.get("step"), line.get(name)) for line in lines)
        points = [pair for pair in values if all(isinstance(n, int | float) for n in pair)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(picture) as file:
        figure.savefig(file, format="png", dpi=120)
