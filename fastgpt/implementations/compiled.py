"""C compiled for this CPU at first use by the machine's own compiler: optional wherever it is used.

Kept in the user's cache, under a name that says what it was made of.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fastgpt.devices import cpu_info

_SHARED = Path(__file__).with_name("vectors.h")  # what all of them include
# not -fwrapv: with it a decoding step in bf16 takes 30 to 45 % longer
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_END = b"fastgpt: all of it"  # loaders do not read what is behind a library


@functools.cache
def library(source: Path) -> ctypes.CDLL | str:
    """A C file as a library, or why there is none."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "there is no C compiler (cc, gcc, clang) and $CC names none"
    read = source.read_bytes(), _SHARED.read_bytes()
    made_of = (*read, compiler, *_FLAGS, platform.machine(), _cpu())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastgpt"
        path /= f"{source.stem}-{key}.so"
        if not _is_whole(path):
            _compile(source, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # no home: RuntimeError
        return f"compiling {source.name} failed: {getattr(error, 'stderr', None) or error}"


def _is_whole(path: Path) -> bool:
    """Whether it ends as `_compile` left it: a library that was cut off would end the process."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            return file.read() == _END
    except OSError:
        return False


def _compile(source: Path, compiler: str, path: Path) -> None:
    """Under another name first: several processes may be at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        command = [*compiler.split(), *_FLAGS, f"-I{_SHARED.parent}", str(source)]
        command += ["-o", str(temporary), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with temporary.open("ab") as file:
            file.write(_END)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _cpu() -> str:
    """What -march=native looks at: a home folder may be on several machines."""
    names = ("model name", "flags", "Features")
    lines = cpu_info().splitlines()
    facts = (next((line for line in lines if line.startswith(name)), "") for name in names)
    return "".join(facts) or platform.processor()
