"""The history of a run: log.jsonl always, TensorBoard and W&B on request, loss.png at the end.

The first line says which run it is and with which settings; then a line for each step and each
validation. A resumed run goes on in it, from the step of its checkpoint.
"""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastgpt.storage import files
from fastgpt.training.config import TrainConfig

NAME = "log.jsonl"


class Log:
    def __init__(self, folder: Path, settings: Mapping[str, Any], config: TrainConfig, step: int):
        """A run that is at `step`: what an earlier one of it wrote later is forgotten."""
        self.path = folder / NAME
        self._others = _others(folder, settings, config)
        past = [line for line in read(self.path) if line.get("step", 0) <= step] if step else []
        run = past[0].get("run") if past else None
        self.run = run if isinstance(run, str) else secrets.token_hex(8)
        if run != self.run:
            past.insert(0, {"run": self.run, "settings": dict(settings)})
        files.write_bytes(self.path, "".join(map(_line, past)).encode())
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(self.path, flags), "a", encoding="utf-8")

    def add(self, step: int, **values: Any) -> None:
        self._write(_line({"step": step, **values}))
        for other in self._others:
            other(step, values)

    def sync(self) -> None:
        """Before a checkpoint: its history must last as long."""
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
        with suppress(OSError):  # which was said when it was synced
            self._file.close()
        for other in self._others:
            other(None, {})


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


def _others(folder: Path, settings: Mapping[str, Any], config: TrainConfig) -> list[Any]:
    """Functions of (step, values), and of (None, {}) at the end."""
    found = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--tensorboard needs it ({error}); pip install tensorboard"
            ) from None
        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int | None, values: Mapping[str, Any]) -> None:
            if step is None:
                writer.close()
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        found.append(to_tensorboard)
    if config.wandb:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"--wandb needs it ({error}); pip install wandb") from None
        where = dict(project=config.wandb_project, name=config.wandb_name, dir=str(folder))
        run = wandb.init(mode=config.wandb, config=dict(settings), **where)

        def to_wandb(step: int | None, values: Mapping[str, Any]) -> None:
            if step is None:
                run.finish()
            else:
                run.log(dict(values), step=step)

        found.append(to_wandb)
    return found


def draw(log: Path, picture: Path) -> str:
    """Write the loss curves of a log -> what to tell about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss.png, which needs matplotlib; pip install 'fastgpt[plot]'"
    lines = read(log)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, label, style in (
        ("loss", "training, each step", dict(linewidth=0.6, alpha=0.6)),
        ("train_loss", "training, at validations", dict(marker=".")),
        ("val_loss", "validation", dict(marker=".")),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line and "step" in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with files.replacing(picture) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        return f"no loss curves: {error}"
    return f"loss curves: {picture}"
