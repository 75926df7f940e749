"""What a session leaves in its folder, whole at every moment: a state, a table, tuned.json, a tar.

Every file is written beside its place and renamed into it, so that a SIGKILL leaves the old one.
The stages' own files lie in a work folder of the system's temporary directory, and in
results.tar.gz from one call to the next, perhaps on another machine.
"""

import contextlib
import gzip
import io
import json
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KIT = 2  # the layout of the state
STATE, TABLE, TUNED, TAR = "gpu.json", "table.txt", "tuned.json", "results.tar.gz"
LIMIT = 15 * 2**20  # bytes of one file: 16 MiB come back from some machines
TOO_LARGE = 2**29  # bytes of a file that is not worth compressing
MAX_UNPACKED = 2 * 2**30  # of a tar that is read again
State = dict[str, Any]


def write(path: Path, content: bytes) -> None:
    """All of it or none. OSError where the disk is full; what was there stays."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def new(rehearsal: bool) -> State:
    return {"kit": KIT, "rehearsal": rehearsal, "calls": [], "preflight": {}, "stages": {},
            "left_out": []}  # fmt: skip


def read(path: Path) -> State:
    """ValueError says what is wrong with it."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no state of bench.gpu: {error}") from None
    kinds = {"calls": list, "preflight": dict, "stages": dict, "left_out": list, "rehearsal": bool}
    if not isinstance(state, dict) or state.get("kit") != KIT:
        found = state.get("kit") if isinstance(state, dict) else None
        raise ValueError(f"{path} is no state of bench.gpu: kit is {found!r}, not {KIT}")
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path} is no state of bench.gpu: {name} is {state.get(name)!r:.60}")
    for name, entry in state["stages"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("tries"), int):
            raise ValueError(f"{path} is no state of bench.gpu: stage {name} is {entry!r:.60}")
    return state


def dumps(state: State) -> bytes:
    return (json.dumps(_finite(state), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def work_folder(state: State) -> Path:
    """That of an earlier call if it is on this machine still, else a new one."""
    before = Path(str(state.get("work")))
    ours = before.name.startswith("fastgpt-gpu-") and before.is_dir()
    if ours and os.access(before, os.W_OK):
        return before
    return Path(tempfile.mkdtemp(prefix="fastgpt-gpu-"))


def _files(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if not path.is_symlink())
    return [path for path in found if path.is_file()]


def tidy(folder: Path) -> list[str]:
    """Compress what is large, delete what is larger still; what was done with which file."""
    said = []
    for path in _files(folder):
        size = path.lstat().st_size
        with contextlib.suppress(OSError):
            if size > TOO_LARGE:
                path.unlink()
                said.append(f"{path.name} of {size:,} bytes was deleted")
            elif size > 2**20 and path.suffix == ".json" and "records" not in path.parts:
                with path.open("rb") as source, gzip.open(f"{path}.gz", "wb", 5) as target:
                    shutil.copyfileobj(source, target)
                path.unlink()
    return said


def pack(work: Path, path: Path, limit: int = LIMIT) -> list[str]:
    """Write a tar of `work` that is within `limit`; the names of what was deleted for that.

    The largest profiles go first, then other large files, records last.
    """
    files = _files(work)

    def order(file: Path) -> tuple[bool, bool, int]:
        parts = file.relative_to(work).parts
        return "records" not in parts, parts[0].startswith("profile"), file.lstat().st_size

    files.sort(key=order)
    left_out: list[str] = []
    while True:
        packed = _tar(work, files)
        if len(packed) <= limit or not files:
            write(path, packed)
            return left_out
        left_out.append(str(files[-1].relative_to(work)))
        files.pop().unlink()


def _tar(work: Path, files: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as tar:
        for file in files:
            with contextlib.suppress(OSError):
                tar.add(file, str(file.relative_to(work)), recursive=False)
    return buffer.getvalue()


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a tar. ValueError where it is none, or reaches outside its folder."""
    total = 0
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                parts = Path(member.name).parts
                if not member.isfile() or Path(member.name).is_absolute() or ".." in parts:
                    raise ValueError(f"{path} holds {member.name!r}, which no session writes")
                if (total := total + member.size) > MAX_UNPACKED:
                    raise ValueError(f"{path} unpacks to more than {MAX_UNPACKED:,} bytes")
                yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
    except (OSError, EOFError, tarfile.TarError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise ValueError(f"{path} is no tar.gz of a session: {error}") from None


def unpack(path: Path, work: Path) -> None:
    """What is in `work` already is newer, and stays."""
    for name, content in members(path):
        target = work / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
