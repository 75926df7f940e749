"""The inputs of stages: sizes, an environment, and files brought along in .local/ of the checkout.

.local/nanoGPT/model.py    (or $NANOGPT_DIR) the real nanoGPT
.local/liger               wheels of Liger, or a folder that holds liger_kernel/
.local/data/train.bin      tokens, for loss curves
"""

import contextlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bench.gpu.stages import REAL, TOY

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / ".local"


class Inputs:
    def __init__(self, rehearsal: bool):
        self.rehearsal = rehearsal
        self.site: Path | None = None  # folder of the unpacked wheels

    def carried(self) -> dict[str, str]:
        """name -> folder, of the files in .local/ that exist."""
        folders = {}
        nanogpt = Path(os.environ.get("NANOGPT_DIR") or CARRIED / "nanoGPT")
        if (nanogpt / "model.py").is_file():
            folders["nanoGPT"] = str(nanogpt.resolve())
        if (CARRIED / "data/train.bin").is_file():
            folders["data"] = str(CARRIED / "data")
        if (CARRIED / "liger").is_dir():
            folders["liger"] = str(CARRIED / "liger")
        return folders

    def values(self) -> dict[str, Any]:
        """The values for the words in braces of a stage's command."""
        carried = self.carried()
        rival = "nanogpt-compile" if "nanoGPT" in carried else "compile"
        return {**(TOY if self.rehearsal else REAL), **carried, "compile": rival}

    def environment(self) -> dict[str, str]:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        if self.rehearsal:
            env |= {"TRITON_INTERPRET": "1", "FASTGPT_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""}
        carried = self.carried()
        env.pop("NANOGPT_DIR", None)  # a folder without nanoGPT would end a stage
        if "nanoGPT" in carried:
            env["NANOGPT_DIR"] = carried["nanoGPT"]
        if "liger" in carried:
            paths = [self._unpacked(Path(carried["liger"])), os.environ.get("PYTHONPATH")]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return env

    def _unpacked(self, folder: Path) -> str:
        """The folder's wheels, unpacked, as Triton reads kernels' source files; without wheels, the
        folder itself.
        """
        wheels = sorted(folder.glob("*.whl"))
        if wheels and self.site is None:
            self.site = Path(tempfile.mkdtemp(prefix="fastgpt-site-"))
            for wheel in wheels:
                with contextlib.suppress(OSError, zipfile.BadZipFile):
                    shutil.unpack_archive(wheel, self.site, "zip")
        return str(self.site or folder)

    def forget(self) -> None:
        if self.site is not None:
            shutil.rmtree(self.site, ignore_errors=True)
            self.site = None
