"""One process at a time works in a folder: a lock of the kernel's, which ends with its process."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from fastgpt.storage import files


class Lock:
    """Held from construction until `release`, the end of a `with`, or the end of the process."""

    def __init__(self, folder: Path, what: str):
        """OSError says who holds it: `what` is what it is for, as in "training into out"."""
        self._path = path = folder / ".lock"
        self._fd: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._fd = os.open(path, flags, 0o666)
            os.ftruncate(self._fd, os.fstat(self._fd).st_size)  # only a file can be written to
        except OSError as error:
            raise files.explained(error, path if folder.is_dir() else folder) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip()
            self.release()
            raise OSError(
                f"{folder} is in use: {holder or 'another process'} is {what}; wait for its end, "
                "or use another folder"
            ) from None
        except OSError:
            pass  # a file system without locks: better unlocked than not at all
        with suppress(OSError):  # a full disk: whoever writes more than this says so
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def check(self) -> None:
        """OSError if the folder was moved away and another has its name: it is somebody else's."""
        try:
            here = os.stat(self._path, follow_symlinks=False)
        except OSError:
            return
        if self._fd is not None and not os.path.samestat(here, os.fstat(self._fd)):
            raise OSError(
                f"{self._path.parent} is another folder than at the start, or has another .lock: "
                "another run's, it may be; move the first one back, or go on in it with --resume"
            )

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
