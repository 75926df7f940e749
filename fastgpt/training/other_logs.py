"""TensorBoard and Weights & Biases, by flag, beside a run's own log.

One that cannot begin is an error before training. Once training runs it needs neither: one that
fails is reported and left out.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgpt.storage.printable import printable
from fastgpt.training.config import TrainConfig

Writer = Callable[[int | None, Mapping[str, Any]], None]  # (step, values), (None, {}) at the end


class OtherLogs:
    def __init__(self, folder: Path, config: TrainConfig, step: int):
        """Those that `config` asks for, of a run at `step`. OSError says why one cannot begin."""
        self.writers: dict[str, Writer] = {}
        if config.tensorboard:
            self._open("tensorboard", lambda: _tensorboard(folder / "tensorboard", step))
        if config.wandb not in (None, "disabled"):
            self._open("wandb", lambda: _wandb(folder, config))

    def _open(self, name: str, writer: Callable[[], Writer]) -> None:
        try:
            self.writers[name] = writer()
        except ImportError as error:
            raise ImportError(
                f"--{name} needs the package {name} ({error}); pip install {name}"
            ) from None
        except Exception as error:  # of an account, a network, a disk, a name that is refused
            raise OSError(f"--{name} cannot begin: {_reason(error)}; or leave it out") from None

    def add(self, step: int | None, values: Mapping[str, Any]) -> None:
        for name, write in list(self.writers.items()):
            try:
                write(step, values)
            except Exception as error:
                del self.writers[name]
                text = f"fastgpt: --{name} has ended, training goes on: {_reason(error)}"
                print(printable(text), file=sys.stderr)

    def close(self) -> None:
        self.add(None, {})


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _tensorboard(folder: Path, step: int) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    # of what an earlier run, or this one before it was resumed, has written later
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def write(step: int | None, values: Mapping[str, Any]) -> None:
        if step is None:
            writer.close()
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write


def _wandb(folder: Path, config: TrainConfig) -> Writer:
    import wandb

    where = dict(project=config.wandb_project, name=config.wandb_name, dir=str(folder))
    run = wandb.init(mode=config.wandb, config=asdict(config), **where)

    def write(step: int | None, values: Mapping[str, Any]) -> None:
        if step is None:
            run.finish()
        else:
            run.log(dict(values), step=step)

    return write
