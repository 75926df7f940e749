"""`fastgpt prepare`: texts as a data folder (data.py), read piece by piece in as little memory.

Everything is written beside its place and put there at the end; from the first file put there to
the last the folder's manifest says that it is not whole (storage/manifest.py).
"""

import argparse
import ctypes
import hashlib
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from fastgpt import devices
from fastgpt.commands import options
from fastgpt.data import GPT2, GPT2_TOKENS, Characters, Tokenizer, python_documentation
from fastgpt.storage import files, manifest, texts
from fastgpt.storage.lock import Lock
from fastgpt.storage.manifest import Manifest
from fastgpt.storage.printable import printable

END_OF_TEXT = GPT2_TOKENS - 1
_ONE_PROCESS = 8 * texts.PIECE  # below so many characters others would not be worth their start


def prepare(
    text: str, out: Path, tokenizer: str = "char", val_fraction: float = 0.1, force: bool = False
) -> Tokenizer:
    """Write `text` as a data folder: its end to validate, the rest to train on."""
    return prepare_documents(texts.of_string(text), out, tokenizer, val_fraction, force)


def prepare_documents(
    documents: texts.Documents,
    out: Path,
    tokenizer: str = "char",
    val_fraction: float = 0.1,
    force: bool = False,
    processes: int | None = None,
    named: str = "the text",
) -> Tokenizer:
    """The same for many. FileExistsError, unless `force`, if other data are there.

    Documents are separated by end-of-text, for characters by a new line. Errors call them `named`.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction {val_fraction} must be above 0 and below 1")
    if tokenizer == "gpt2":
        GPT2().encode("")  # a missing tokenizer ends it before anything else
    with Lock(out, "preparing data there"):
        files.sweep(out)
        before = _before(out, force)
        seen = _look_through(documents, f"{tokenizer} {val_fraction}", tokenizer == "char")
        _check_length(seen, tokenizer, val_fraction, named)
        if before is not None and before.whole and not force:
            if before.sources != seen.sources:
                raise _other_data(out)
            return Characters(seen.characters) if tokenizer == "char" else GPT2()
        files.check_room(out, 2 * seen.length if tokenizer == "char" else seen.length // 2)
        return _write(documents, out, tokenizer, val_fraction, seen, processes)


def _before(out: Path, force: bool) -> Manifest | None:
    """The manifest of data that are there already."""
    try:
        record = manifest.load(out)
    except ValueError:
        if not force:
            raise _other_data(out) from None
        return None
    has_data = any((out / name).exists() for name in ("train.bin", "val.bin", "meta.pkl"))
    if record is None and has_data and not force:
        raise _other_data(out)
    return record


def _other_data(out: Path) -> FileExistsError:
    return FileExistsError(f"{out} holds other data; --force writes over it, or use another --out")


@dataclass(frozen=True)
class _Seen:
    length: int  # characters
    characters: list[str]  # all there are, if they were asked for
    sources: str  # sha256


def _look_through(documents: texts.Documents, how: str, characters: bool) -> _Seen:
    length, alphabet, digest = 0, set[str](), hashlib.sha256(how.encode())
    for number, pieces in enumerate(documents()):
        length += number > 0  # what separates it from the one before
        digest.update(b"\xff" * (number > 0))
        for piece in pieces:
            length += len(piece)
            digest.update(piece.encode("utf-8", "surrogatepass"))
            if characters:
                alphabet.update(piece)
    if characters and number:
        alphabet.add("\n")
    return _Seen(length, sorted(alphabet), digest.hexdigest())


def _check_length(seen: _Seen, tokenizer: str, val_fraction: float, named: str) -> None:
    if tokenizer == "char" and len(seen.characters) > 2**16:
        raise ValueError(
            f"{named} has {len(seen.characters)} different characters, more than the {2**16} that "
            "uint16 ids allow; use --tokenizer gpt2"
        )
    if seen.length < 20:
        raise ValueError(f"{named} of {seen.length} characters is too short; use one of 20 or more")
    split = _split(seen.length, val_fraction)
    if not 0 < split < seen.length:
        part = "validate" if split else "train"
        raise ValueError(
            f"--val-fraction {val_fraction} of {named}'s {seen.length} characters leaves none to "
            f"{part} on"
        )


def _split(length: int, val_fraction: float) -> int:
    return int((1 - val_fraction) * length)


def _write(
    documents: texts.Documents,
    out: Path,
    tokenizer: str,
    val_fraction: float,
    seen: _Seen,
    processes: int | None,
) -> Tokenizer:
    chosen = Characters(seen.characters) if tokenizer == "char" else GPT2()
    encode = _CharacterEncoder(seen.characters) if tokenizer == "char" else _encode_gpt2
    separator = "\n" if tokenizer == "char" else "<|endoftext|>"
    pieces = _pieces(documents, separator, _split(seen.length, val_fraction))
    if tokenizer != "char":
        pieces = _between_words(pieces)
    if processes is None:
        processes = min(devices.cpus(), 8) if seen.length > _ONE_PROCESS else 1
    content = Manifest(tokenizer, chosen.vocab_size, seen.sources)
    with ExitStack() as stack:
        room = 2 * seen.length if tokenizer == "char" else 0
        opened = [
            _Bin(stack.enter_context(files.replacing(out / f"{name}.bin", room)))
            for name in ("train", "val")
        ]
        bar = _progress(seen.length)
        for part, length, ids in _encoded(pieces, encode, processes):
            opened[part].write(ids)
            bar.update(length)
        bar.close()
        names = ("train.bin", "val.bin")
        content = replace(
            content,
            tokens={name: bin.count for name, bin in zip(names, opened, strict=True)},
            sha256={name: bin.digest.hexdigest() for name, bin in zip(names, opened, strict=True)},
            whole=False,
        )
        content.write(out)  # from here on the folder is neither the old nor the new one
    meta = out / "meta.pkl"
    if chosen.characters is None:
        meta.unlink(missing_ok=True)  # of other data that was here before
    else:
        itos = dict(enumerate(seen.characters))
        pickled = pickle.dumps({"vocab_size": len(itos), "stoi": chosen.ids, "itos": itos})
        files.write_bytes(meta, pickled)
        content.sha256["meta.pkl"] = hashlib.sha256(pickled).hexdigest()
    replace(content, whole=True).write(out)
    return chosen


class _Bin:
    """A file of ids, with their number and checksum."""

    def __init__(self, file: BinaryIO):
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def write(self, ids: bytes) -> None:
        self.file.write(ids)
        self.digest.update(ids)
        self.count += len(ids) // 2


Piece = tuple[int, str]  # 0 to train on, 1 to validate; the text


def _pieces(documents: texts.Documents, separator: str, split: int) -> Iterator[Piece]:
    """The whole text in pieces, cut after `split` characters, a separator counting as one."""
    at = 0
    for number, pieces in enumerate(documents()):
        if number:
            yield int(at >= split), separator
            at += 1
        for piece in pieces:
            before = max(min(split - at, len(piece)), 0)
            at += len(piece)
            yield from ((part, s) for part, s in ((0, piece[:before]), (1, piece[before:])) if s)


def _between_words(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces of each part joined and cut anew, so that no token is cut."""
    waiting: deque[Piece] = deque()

    def of_part(part: int) -> Iterator[str]:
        while waiting or (following := next(pieces, None)):
            piece = waiting.popleft() if waiting else following
            assert piece is not None
            if piece[0] != part:
                waiting.append(piece)
                return
            yield piece[1]

    for part in (0, 1):
        yield from ((part, piece) for piece in texts.cut_between_words(of_part(part)))


class _CharacterEncoder:
    """Characters to the bytes of their ids, through a table of code points."""

    def __init__(self, characters: Sequence[str]):
        points = torch.tensor([ord(c) for c in characters])
        self.table = torch.full((0x110000,), -1, dtype=torch.int32)
        self.table[points] = torch.arange(len(characters), dtype=torch.int32)

    def __call__(self, text: str) -> bytes:
        points = torch.frombuffer(
            bytearray(text.encode(f"utf-32-{sys.byteorder[0]}e", "surrogatepass")),
            dtype=torch.int32,
        )
        ids = self.table[points]
        if (ids < 0).any():
            raise ValueError("a text changed while it was read; prepare it again")
        return _uint16(ids)


def _encode_gpt2(text: str) -> bytes:
    global _gpt2
    _gpt2 = _gpt2 or GPT2()
    return _uint16(torch.tensor(_gpt2.encode(text), dtype=torch.int32))


_gpt2: GPT2 | None = None  # of this process


def _uint16(ids: torch.Tensor) -> bytes:
    low = ids.to(torch.int16)
    return ctypes.string_at(low.data_ptr(), 2 * low.numel())  # without numpy


def _encoded(
    pieces: Iterable[Piece], encode: Callable[[str], bytes], processes: int
) -> Iterator[tuple[int, int, bytes]]:
    """(part, length of the text, its ids) in order, few of them in memory at once."""
    if processes == 1:
        yield from ((part, len(text), encode(text)) for part, text in pieces)
        return
    pool = ProcessPoolExecutor(processes, get_context("fork"), _in_worker, (os.getpid(),))
    under_way: deque[tuple[int, int, Future[bytes]]] = deque()
    try:
        for part, text in pieces:
            under_way.append((part, len(text), pool.submit(encode, text)))
            if len(under_way) > 2 * processes:
                yield _done(under_way)
        while under_way:
            yield _done(under_way)
    finally:
        pool.shutdown(cancel_futures=True)


def _done(under_way: deque[tuple[int, int, "Future[bytes]"]]) -> tuple[int, int, bytes]:
    part, length, future = under_way.popleft()
    return part, length, future.result()


def _in_worker(parent: int) -> None:
    """A worker ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _progress(length: int) -> Any:
    live = sys.stderr.isatty()
    return tqdm(
        total=length,
        unit=" characters",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.1 if live else 10,
        delay=1 if live else 10,
        leave=False,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="*",
        type=Path,
        help="UTF-8 texts, folders of .txt (Python's documentation)",
    )
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), default="char")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="of the text, its end (%(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=options.number(int, 1, 1024),
        help="that tokenize (as many as CPUs, at most 8)",
    )
    parser.add_argument("--force", action="store_true", help="write over other data")


def main(args: argparse.Namespace) -> int:
    documents = texts.of_files(args.file) if args.file else texts.of_string(python_documentation())
    names = [*map(str, args.file)] or ["Python's documentation"]
    named = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    how = (args.tokenizer, args.val_fraction, args.force, args.processes)
    tokenizer = prepare_documents(documents, args.out, *how, named)
    record = manifest.load(args.out)
    assert record is not None
    print(printable(f"{args.out}: vocabulary of {tokenizer.vocab_size:,}"), end="")
    train, val = record.tokens["train.bin"], record.tokens["val.bin"]
    print(f", {train:,} tokens to train on, {val:,} to validate")
    return 0
