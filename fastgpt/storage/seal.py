"""A checksum inside of a zip archive, in the comment at its end: torch reads the archive as before.

archive as torch.save wrote it | comment: MARK, then sha256 of every byte before, as hex
"""

import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

MARK = b"fastgpt sha256 "
_DIGEST = 64
_END = 22  # bytes of a zip's last record, which ends in the length of its comment


def seal(file: BinaryIO) -> None:
    """Append the checksum to an archive without a comment, open to read and write."""
    file.seek(-_END, 2)
    tail = file.read()
    if tail[:4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise ValueError("not a zip archive that ends without a comment")
    file.seek(-2, 2)
    file.write((len(MARK) + _DIGEST).to_bytes(2, "little") + MARK)
    digest = _sha256(file, file.tell())
    file.write(digest.encode())


def is_sealed(file: BinaryIO, path: Path) -> bool:
    """Whether there is a checksum. ValueError if it does not match: some byte has changed."""
    size = file.seek(0, 2)
    if size < _END + len(MARK) + _DIGEST:
        return False
    file.seek(-len(MARK) - _DIGEST, 2)
    mark, digest = file.read(len(MARK)), file.read()
    if mark != MARK:
        return False
    if digest != _sha256(file, size - _DIGEST).encode():
        raise ValueError(
            f"{path} is damaged: its content does not match its checksum; use another checkpoint, "
            "or a copy of this one"
        )
    return True


def check_members(file: BinaryIO, path: Path) -> None:
    """ValueError unless this is a whole zip of uncompressed files with the right CRCs, which torch
    does not look at."""
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                    raise ValueError(f"{member.filename} is compressed or encrypted")
            damaged = archive.testzip()
    except Exception as error:  # a damaged archive raises anything
        raise ValueError(f"{path} is no checkpoint, or damaged: {error}") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it does not match its checksum")


def _sha256(file: BinaryIO, size: int) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, 2**20))):
        digest.update(piece)
        size -= len(piece)
    file.seek(0, 2)
    return digest.hexdigest()
