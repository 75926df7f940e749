"""nanoGPT's data on disk, and the tokenizers that it was made by.

A data folder holds train.bin and val.bin, token ids as uint16 in the machine's byte order, and for
character data meta.pkl, a dict of vocab_size, stoi and itos. Without meta.pkl the ids are GPT-2's.
"""

import codecs
import functools
import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.storage import manifest, texts
from fastgpt.storage.printable import first_line

GPT2_TOKENS = 50257
GPT2_VOCAB_SIZE = 50304  # the same, padded to a multiple of 64 for speed
_LOOKED_AT = 2**22  # ids of a file that are checked before training; the others when they are read


class Characters:
    """Token i is characters[i]."""

    def __init__(self, characters: Sequence[str]):
        self.characters = list(characters)
        self.vocab_size = len(self.characters)
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.start = "\n" if "\n" in self.ids else self.characters[0]  # a prompt if none is given

    def encode(self, text: str) -> list[int]:
        if unknown := sorted(set(text) - self.ids.keys()):
            raise ValueError(f"the model was trained without {', '.join(map(repr, unknown))}")
        return [self.ids[character] for character in text]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        return (self.characters[i] for i in ids)


class GPT2:
    """OpenAI's byte-pair encoding, through tiktoken."""

    characters = None
    vocab_size = GPT2_VOCAB_SIZE
    start = "\n"

    @functools.cached_property
    def encoding(self) -> Any:
        """Loaded when it is first needed, which training is not."""
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                f"GPT-2's tokenizer needs tiktoken ({error}); pip install 'fastgpt[data]'"
            ) from None
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network had to say
            reason = f"{type(error).__name__}: {first_line(error):.200}"
            raise OSError(
                f"GPT-2's tokenizer could not be loaded ({reason}); "
                "offline, set TIKTOKEN_CACHE_DIR to a folder that an earlier use online has filled"
            ) from None

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special={"<|endoftext|>"})

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as soon as it is whole: a character may span several tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            padding = i >= self.encoding.n_vocab
            yield "" if padding else decoder.decode(self.encoding.decode_single_token_bytes(i))
        yield decoder.decode(b"", final=True)


Tokenizer = Characters | GPT2


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a data folder."""
    path = folder / "meta.pkl"
    if not os.path.lexists(path):
        return GPT2()
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        if path.stat().st_size > 2**26:
            raise ValueError("it is larger than any vocabulary of characters")
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        return Characters(_vocabulary(meta))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path} is no meta.pkl of vocab_size, stoi and itos: {error or type(error).__name__}"
        ) from None


def _vocabulary(meta: Any) -> list[str]:
    itos = meta["itos"]
    size = meta.get("vocab_size", len(itos))  # nanoGPT's sample.py does not read it
    if not isinstance(size, int) or not 0 < size <= 2**16 or len(itos) != size:
        raise ValueError(f"vocab_size={size!r:.40} is not the number of its {len(itos)} characters")
    characters = [itos[i] for i in range(size)]
    if not all(isinstance(c, str) and c for c in characters) or len(set(characters)) != size:
        raise ValueError("itos does not name a different text for each id")
    if meta["stoi"] != {character: i for i, character in enumerate(characters)}:
        raise ValueError("stoi and itos contradict each other")
    return characters


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, strings and numbers only: a pickle that imports something could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


class Split:
    """The ids of a train.bin or val.bin, read where they are asked for.

    Nothing is mapped: a file that is shortened under a running training is an error, not a signal.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.vocab_size = path, vocab_size
        self._file = path.open("rb")
        size = path.stat().st_size
        if size % 2:
            raise ValueError(
                f"{path} has {size} bytes, an odd number: no file of uint16 ids; it may have been "
                "cut off. Run `fastgpt prepare` again"
            )
        self._length = size // 2

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> Tensor:
        """ids[start : start + count] (count,) int64. ValueError for one that the model lacks."""
        content = os.pread(self._file.fileno(), 2 * count, 2 * start)
        if len(content) != 2 * count:
            raise ValueError(
                f"{self.path} has become shorter than the {len(self)} tokens it had at the start; "
                "training ends. Put the file back, and go on with --resume"
            )
        ids = torch.frombuffer(bytearray(content), dtype=torch.int16).long() & 0xFFFF
        if (largest := int(ids.max())) >= self.vocab_size:
            position = start + int(ids.argmax())
            raise ValueError(
                f"{self.path} has the id {largest} at position {position}, beyond the vocabulary "
                f"of {self.vocab_size}: it was written with another tokenizer, or damaged; run "
                "`fastgpt prepare` again"
            )
        return ids

    def windows(self, starts: Sequence[int], length: int) -> Tensor:
        """(len(starts), length) int64."""
        return torch.stack([self.read(start, length) for start in starts])


def open_data(folder: Path, verify: bool = True) -> tuple[Tokenizer, dict[str, Split], str]:
    """A data folder's tokenizer, its splits "train" and "val", and what identifies its content.

    ValueError names what is wrong with it: not whole, cut off, of another type, or without the
    vocabulary that its ids belong to. To `verify` is to read all of it, for its checksums.
    """
    paths = {name: _existing(folder, name) for name in ("train", "val")}
    record = manifest.load(folder)
    if record is not None:
        record.check(folder, verify)
    tokenizer = load_tokenizer(folder)
    kind = "gpt2" if isinstance(tokenizer, GPT2) else "char"
    if record is not None and (record.tokenizer, record.vocab_size) != (kind, tokenizer.vocab_size):
        raise ValueError(
            f"{folder / manifest.NAME} says {record.tokenizer} and a vocabulary of "
            f"{record.vocab_size}, the folder has {kind} and {tokenizer.vocab_size}; run `fastgpt "
            "prepare` again"
        )
    known = GPT2_TOKENS if isinstance(tokenizer, GPT2) else tokenizer.vocab_size
    splits = {name: Split(path, known) for name, path in paths.items()}
    for split in splits.values():
        if record is None:
            _check_foreign(split, tokenizer)
        split.read(0, min(len(split), _LOOKED_AT))
    return tokenizer, splits, record.identity() if record else _identity(splits)


def _check_foreign(split: Split, tokenizer: Tokenizer) -> None:
    """A file without a manifest: nanoGPT's prepare.py, or anything else, may have written it."""
    content = split.path.open("rb").read(2 * min(len(split), _LOOKED_AT))
    ids = torch.frombuffer(bytearray(content), dtype=torch.int16).int() & 0xFFFF
    low, high = ids[0::2], ids[1::2]
    if len(high) >= 8 and not high.any() and len(low.unique()) > 2:
        raise ValueError(
            f"{split.path} looks like uint32: every second of its uint16 ids is 0. Write the ids "
            "as uint16, or run `fastgpt prepare`"
        )
    largest, count = int(ids.max()), len(ids)
    if (
        isinstance(tokenizer, GPT2)
        and count >= 1000
        and largest < (256 if count < 100_000 else 10_000)
    ):
        raise ValueError(
            f"no {split.path.with_name('meta.pkl')}, and {split.path} is no GPT-2 data: its ids "
            f"end at {largest}. Put its meta.pkl back, or run `fastgpt prepare`"
        )


def _identity(splits: Mapping[str, Split]) -> str:
    """For files without a manifest: their lengths, beginnings and ends."""
    digest = hashlib.sha256()
    for split in splits.values():
        piece = min(len(split), 2**16)
        digest.update(f"{len(split)} ".encode())
        for start in (0, len(split) - piece):
            digest.update(os.pread(split._file.fileno(), 2 * piece, 2 * start))
    return digest.hexdigest()


def _existing(folder: Path, split: str) -> Path:
    path = folder / f"{split}.bin"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; make one with `fastgpt prepare FILE --out {folder}`, or "
            "name the folder that has it with --data"
        )
    if path.stat().st_size < 2:
        raise ValueError(f"{path} is empty; `fastgpt prepare` writes it anew")
    return path


def load_split(folder: Path, split: str) -> Tensor:
    """The ids of "train" or "val", mapped, not read. As int16: those above 32767 are negative."""
    path = _existing(folder, split)
    size = path.stat().st_size // 2
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.int16)


def random_batch(
    ids: Tensor | Split,
    batch_size: int,
    block_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Random windows x (B, T) of `ids`, and y (B, T), the id that follows each of theirs; both
    contiguous, as nanoGPT's loss takes targets.view(-1).
    """
    windows = random_windows(ids, batch_size, block_size, generator)
    if device.type == "cuda":  # from pinned memory the copy does not hold up the CPU
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def random_windows(
    ids: Tensor | Split, batch_size: int, block_size: int, generator: torch.Generator
) -> Tensor:
    """(B, T + 1) int64, on the CPU."""
    if len(ids) <= block_size:
        name = ids.path if isinstance(ids, Split) else "a split"
        raise ValueError(
            f"{name} of {len(ids)} tokens has no window of {block_size} and the token after it; "
            "use a smaller --block-size or more text"
        )
    starts = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)
    if isinstance(ids, Split):
        return ids.windows(starts.flatten().tolist(), block_size + 1)
    return ids[starts + torch.arange(block_size + 1)].long() & 0xFFFF


def read_text(path: Path | None) -> str:
    """A file's text; without one Python's own documentation."""
    return python_documentation() if path is None else "".join(texts.pieces_of(path))


def python_documentation() -> str:
    """A text that every Python carries along."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
