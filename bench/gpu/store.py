"""The four files of a session's folder: a state, a table, tuned.json, a tar.

Each is written under another name and then renamed, so that a SIGKILL leaves the old file whole.
The stages write into a work folder in the system's temporary directory. Between two calls, which
may be on different machines, results.tar.gz holds that folder's files.
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

KIT = 2  # version of the state's layout
STATE, TABLE, TUNED, TAR = "gpu.json", "table.txt", "tuned.json", "results.tar.gz"
LIMIT = 15 * 2**20  # bytes of the tar: some machines send back files up to 16 MiB
TOO_LARGE = 2**29  # bytes of a file that is deleted rather than compressed
MAX_UNPACKED = 2 * 2**30  # bytes; a tar that unpacks to more is refused
State = dict[str, Any]


def write(path: Path, content: bytes) -> None:
    """Replace the file as a whole. OSError where the disk is full: the old file stays."""
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
    """The state in a file; ValueError says what is wrong with it."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no state of bench.gpu: {error}") from None
    kinds = {"calls": list, "preflight": dict, "stages": dict, "left_out": list, "rehearsal": bool}
    if not isinstance(state, dict) or state.get("kit") != KIT:
        kit = state.get("kit") if isinstance(state, dict) else None
        raise ValueError(f"{path} is no state of bench.gpu: kit is {kit!r}, not {KIT}")
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
    """`value` with NaN and infinity, which JSON has not, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def work_folder(state: State) -> Path:
    """The earlier call's folder if it is still on this machine, else a new one."""
    before = Path(str(state.get("work")))
    of_a_session = before.name.startswith("fastgpt-gpu-") and before.is_dir()
    if of_a_session and os.access(before, os.W_OK):
        return before
    return Path(tempfile.mkdtemp(prefix="fastgpt-gpu-"))


def _files(folder: Path) -> list[Path]:
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_symlink())
    return [path for path in paths if path.is_file()]


def tidy(folder: Path) -> list[str]:
    """Compress files above 1 MiB, delete those above TOO_LARGE -> a line for each deleted one."""
    notes = []
    for path in _files(folder):
        size = path.lstat().st_size
        with contextlib.suppress(OSError):
            if size > TOO_LARGE:
                path.unlink()
                notes.append(f"{path.name} of {size:,} bytes was deleted")
            elif size > 2**20 and path.suffix == ".json" and "records" not in path.parts:
                with path.open("rb") as source, gzip.open(f"{path}.gz", "wb", 5) as target:
                    shutil.copyfileobj(source, target)
                path.unlink()
    return notes


def pack(work: Path, path: Path, limit: int = LIMIT) -> list[str]:
    """Write a tar of `work` of at most `limit` bytes -> the names of files deleted to get there.

    The largest profiles are deleted first, then other large files, records last.
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
    """(name, content) of each file. ValueError if it is no tar.gz or a name leaves its folder."""
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
    """Unpack the tar without overwriting files in `work`, which are newer."""
    for name, content in members(path):
        target = work / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
