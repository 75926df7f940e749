"""Texts as pieces that fit in memory: of files, or of one string."""

import codecs
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PIECE = 2**20  # characters

# After each match every tokenizer of words cuts: no token of GPT-2's holds a space or a new line
# between two characters that are neither.
_CUT = re.compile(r"\S(?=[ \n]\S)")

# Documents one after the other, each in pieces; called again for every pass.
Documents = Callable[[], Iterator[Iterator[str]]]


def of_string(text: str) -> Documents:
    return lambda: iter([(text[i : i + PIECE] for i in range(0, len(text), PIECE))])


def of_files(paths: Sequence[Path]) -> Documents:
    """UTF-8 texts; a folder stands for every .txt file in it."""
    listed = [file for path in paths for file in _listed(path)]
    return lambda: (pieces_of(path) for path in listed)


def _listed(path: Path) -> list[Path]:
    if path.is_dir():
        folders = os.walk(path, onerror=_raise)
        files = (Path(folder) / name for folder, _, names in folders for name in names)
        if texts := sorted(p for p in files if p.suffix == ".txt" and p.is_file()):
            return texts
        raise FileNotFoundError(f"{path} is a folder without .txt files; name the files")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file, and a text is read twice; save it as one")
    return [path]


def _raise(error: OSError) -> None:
    raise error


def pieces_of(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise ValueError(f"{path} is no text: it holds bytes of 0; name texts only")
                yield piece
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path)) from None


def _undecodable(path: Path) -> str:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            waiting = len(decoder.getstate()[0])
            piece = file.read(PIECE)
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                byte = error.object[error.start]
                return (
                    f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {at}; convert it first"
                )
            if not piece:
                return f"{path} changed while it was read"
            offset += len(piece)


def cut_between_words(pieces: Iterator[str], longest: int = 16 * PIECE) -> Iterator[str]:
    """The same text, cut where a tokenizer cuts: each piece alone has its tokens in the text."""
    text = ""
    for piece in pieces:
        text += piece
        if len(text) < PIECE:
            continue
        tail = max(len(text) - PIECE // 4, 1)
        cuts = [match.end() for match in _CUT.finditer(text, tail)]
        if cuts or len(text) >= longest:
            end = cuts[-1] if cuts else len(text)
            yield text[:end]
            text = text[end:]
    if text:
        yield text
