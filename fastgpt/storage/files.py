"""Files and folders that are whole or not there, whenever the process or the machine dies.

A file is written beside its place under a name of its own, synced, and renamed over what was there:
until that moment the one before stays. The writer holds a lock on what it writes, which its death
releases, so that a leftover can be told from a file that somebody is still writing.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_MARK = ".fastgpt-"  # in the names of what is being written: .ckpt.pt.fastgpt-0123abcd
_OURS = re.compile(re.escape(_MARK) + "[0-9a-f]{8}")


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """A new file, open to write and read, that takes `path`'s place when the block ends.

    An error leaves `path` as it was and nothing beside it. OSError names the file and, where the
    disk is full, the `needed` bytes. A link at `path` is replaced, not followed.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        temporary, fd = _create_beside(path)
        with os.fdopen(fd, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # before the room that is free is looked at
        raise explained(error, path, needed) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path, len(content)) as file:
        file.write(content)


def copy(source: Path, path: Path) -> None:
    """`path` becomes a copy of `source`: no link, which somebody may write through."""
    with source.open("rb") as read, replacing(path, source.stat().st_size) as file:
        shutil.copyfileobj(read, file, 2**20)


@contextmanager
def replacing_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """The same for a folder. What was at `path`, if anything, is gone afterwards."""
    temporary, aside = _beside(path), _beside(path)
    fd = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        temporary.mkdir()
        fd = os.open(temporary, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield temporary
        sync_tree(temporary)
        if path.is_symlink() or path.exists():
            os.rename(path, aside)  # a folder cannot be renamed over one with files in it
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        remove(temporary)
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise explained(error, path, needed) from None
    finally:
        remove(temporary)
        remove(aside)
        if fd is not None:
            os.close(fd)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what dead writers of `name`, or of anything in `folder`, have left there."""
    with suppress(OSError):  # of another owner, or gone meanwhile: not in the way
        for path in folder.glob(f".{name or '*'}{_MARK}*"):
            if _OURS.search(path.name) and _is_dead(path):
                remove(path)


def _is_dead(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def check_room(folder: Path, needed: int) -> None:
    """OSError, in words, unless a file of `needed` bytes can be written into `folder` now."""
    probe = folder / "ckpt.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary, fd = _create_beside(probe)
        try:
            os.write(fd, b"\0" * 4096)
            os.ftruncate(fd, min(max(needed, 4096), 2**62))  # finds limits and takes no room
            os.fsync(fd)
        finally:
            os.close(fd)
            temporary.unlink(missing_ok=True)
        if free_bytes(folder) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise explained(error, folder, needed) from None


def size_of(path: Path) -> int:
    """Bytes in a file, or in all files of a folder."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in paths if file.is_file())


def free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def sync_folder(folder: Path) -> None:
    """Make the names in it last, as fsync does a file's content."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def explained(error: OSError, path: Path, needed: int = 0) -> OSError:
    """The error with the file's name and, if room was lacking, how much is needed."""
    if error.errno is None:  # `explained` already
        return error
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        room = f"{readable(needed)} needed, " if needed else ""
        reason += f" ({room}{readable(free_bytes(existing))} free in {existing})"
    elif isinstance(error, (FileExistsError, NotADirectoryError)):
        reason += "; a folder is needed there, and something else is in the way"
    return OSError(f"cannot write {path}: {reason}")


def readable(count: int) -> str:
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.{0 if units[0] == 'bytes' else 1}f} {units[0]}"


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}{secrets.token_hex(4)}")


def _create_beside(path: Path) -> tuple[Path, int]:
    """A new file, locked; the permissions are the user's own choice."""
    while True:
        temporary = _beside(path)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return temporary, fd
        os.close(fd)  # swept away before it was locked


def remove(path: Path) -> None:
    """A file or a folder with all that is in it; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):  # asked first: a read-only file system answers for itself
        path.unlink(missing_ok=True)
