"""A run's --out: ckpt.pt, best.pt, numbered ones, each whole at any moment; and nobody else's.

A sharded run's checkpoints are folders sharded-STEP instead (sharded_folder.py).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastgpt import checkpoint
from fastgpt.storage import files
from fastgpt.storage.lock import Lock
from fastgpt.training.log import NAME

LATEST, BEST = "ckpt.pt", "best.pt"
_NUMBERED = re.compile(r"ckpt-(\d+)\.pt")
_SHARDED = re.compile(r"sharded-(\d+)")


def superseded(numbers: Iterable[int], step: int, keep: int) -> list[int]:
    """The numbers of the checkpoints to delete once that of `step` is written: those beyond `step`,
    of a run that went back behind them, and all but the last `keep` up to it (0 keeps all).
    """
    outlived = [n for n in numbers if n > step]
    earlier = sorted(n for n in numbers if n <= step)
    return outlived + earlier[:-keep] * bool(keep)


def sharded(out: Path) -> dict[int, Path]:
    """The steps of a folder's sharded checkpoints, lowest first."""
    return _by_step(_SHARDED, out.glob("sharded-*"))


def _by_step(name: re.Pattern[str], paths: Iterable[Path]) -> dict[int, Path]:
    matches = ((name.fullmatch(path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


class RunFolder:
    """Held until `release`. OSError where it is in use, cannot be written, or, unless it is to
    `resume` or `force`, holds another run.
    """

    def __init__(self, path: Path, keep: int, resume: bool, force: bool):
        self.path, self.keep = path, keep
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--out {path} is a file; name a folder")
        self._lock = Lock(path, "training into it")
        try:
            self._written_over = [] if resume else self._checkpoints()
            if self._written_over and not force:
                raise FileExistsError(
                    f"{self._written_over[0]} is there already; --resume goes on with that run, "
                    "--force writes over it, or use another --out"
                )
            for name in (LATEST, BEST, NAME):  # noticed only at a save, it would cost the run
                if (path / name).is_dir():
                    raise IsADirectoryError(f"{path / name} is a folder, in the way of a file")
            files.sweep(path)
        except OSError:
            self.release()
            raise

    def _checkpoints(self) -> list[Path]:
        """All in the folder, files and sharded ones."""
        files = [self.path / LATEST, self.path / BEST, *self.numbered().values()]
        return [path for path in files if path.is_file()] + list(sharded(self.path).values())

    def check(self) -> None:
        """OSError if the folder of this name is not the one of the start."""
        self._lock.check()

    def check_room(self, size: int) -> None:
        """Whether the checkpoints that a run writes, and one being written, fit on the disk."""
        used = sum(files.size_of(path) for path in self._checkpoints())
        files.check_room(self.path, max((3 + self.keep) * size - used, size))

    def numbered(self) -> dict[int, Path]:
        """Steps of numbered checkpoints, lowest first."""
        return _by_step(_NUMBERED, (p for p in self.path.glob("ckpt-*.pt") if p.is_file()))

    def save(self, saved: Mapping[str, Any], best: bool) -> None:
        self.check()
        step = int(saved["iter_num"])
        latest, copies = self.path / LATEST, self._copies(step, best)
        checkpoint.save_checkpoint(saved, latest)
        for path in copies:
            files.copy(latest, path)
        self.saved(latest, *copies)
        numbered = self.numbered()
        for number in superseded(numbered, step, self.keep):
            numbered[number].unlink()

    def _copies(self, step: int, best: bool) -> list[Path]:
        return [self.path / BEST] * best + [self.path / f"ckpt-{step:06}.pt"] * bool(self.keep)

    def complete(self, step: int, best: bool) -> None:
        """Make the copies of the latest checkpoint that a crash has left out."""
        latest = self.path / LATEST
        if not latest.is_file():  # weights are on shards
            return
        for path in self._copies(step, best):
            if not path.is_file() or path.stat().st_mtime_ns < latest.stat().st_mtime_ns:
                files.copy(latest, path)

    def saved(self, *paths: Path) -> None:
        """Delete what is left of the run that is written over: the checkpoints `paths` are safe."""
        for path in self._written_over:
            if path not in paths:
                files.remove(path)
        self._written_over = []

    def release(self) -> None:
        self._lock.release()
