"""A run's --out: ckpt.pt, best.pt, numbered ones, each whole at any moment; and nobody else's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt import checkpoint
from fastgpt.storage import files
from fastgpt.storage.lock import Lock
from fastgpt.training.log import NAME

LATEST, BEST = "ckpt.pt", "best.pt"
_NUMBERED = re.compile(r"ckpt-(\d+)\.pt")


class RunFolder:
    """Held until `release`. OSError where it is in use, cannot be written, or holds another run."""

    def __init__(self, path: Path, keep: int, overwrite: bool):
        self.path, self.keep = path, keep
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--out {path} is a file; name a folder")
        self._lock = Lock(path, "training into it")
        try:
            if not overwrite and (found := self._runs()):
                raise FileExistsError(
                    f"{found} is there already; --resume goes on with that run, --force writes "
                    "over it, or use another --out"
                )
            for name in (LATEST, BEST, NAME):  # found at a save, it would cost the run
                if (path / name).is_dir():
                    raise IsADirectoryError(f"{path / name} is a folder, in the way of a file")
            files.sweep(path)
        except OSError:
            self.release()
            raise

    def _runs(self) -> Path | None:
        """A checkpoint, of either kind."""
        paths = [self.path / LATEST, *sorted(self.path.glob("sharded-*"))]
        return next((path for path in paths if path.exists()), None)

    def check_room(self, size: int) -> None:
        """Whether the checkpoints that a run writes, and one being written, fit on the disk."""
        there = [self.path / LATEST, self.path / BEST, *self.numbered().values()]
        used = sum(path.stat().st_size for path in there if path.is_file())
        files.check_room(self.path, max((3 + self.keep) * size - used, size))

    def numbered(self) -> dict[int, Path]:
        """Steps of numbered checkpoints, lowest first."""
        paths = (path for path in self.path.glob("ckpt-*.pt") if path.is_file())
        found = ((_NUMBERED.fullmatch(path.name), path) for path in paths)
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def save(self, saved: Mapping[str, Any], best: bool) -> None:
        step = int(saved["iter_num"])
        latest = self.path / LATEST
        checkpoint.save_checkpoint(saved, latest)
        if best:
            files.copy(latest, self.path / BEST)
        if self.keep:
            files.copy(latest, self.path / f"ckpt-{step:06}.pt")
        before = self.numbered()
        outlived = [n for n in before if n > step]  # of what was written over, or went on from here
        kept = [n for n in before if n <= step]
        for number in outlived + kept[: -self.keep] * bool(self.keep):
            before[number].unlink()

    def release(self) -> None:
        self._lock.release()
