"""nanoGPT's data on disk, and the tokenizers that it was made by.

A data folder holds train.bin and val.bin, token ids as uint16 in the machine's byte order, and for
character data meta.pkl, a dict of vocab_size, stoi and itos. Without meta.pkl the ids are GPT-2's.
"""

import codecs
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GPT2_VOCAB_SIZE = 50304  # 50257, padded to a multiple of 64 for speed


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

    def __init__(self) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                f"GPT-2's tokenizer needs tiktoken ({error}); pip install 'fastgpt[data]'"
            ) from None
        self.encoding = tiktoken.get_encoding("gpt2")

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
    if not path.exists():
        return GPT2()
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        return Characters([meta["itos"][i] for i in range(meta["vocab_size"])])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no meta.pkl of vocab_size, stoi and itos: {error}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, strings and numbers only: a pickle that imports something could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def load_split(folder: Path, split: str) -> Tensor:
    """The ids of "train" or "val", mapped, not read. As int16: those above 32767 are negative."""
    path = folder / f"{split}.bin"
    if not path.exists():
        raise FileNotFoundError(f"no {path}; make one with `fastgpt prepare FILE --out {folder}`")
    size = path.stat().st_size // 2
    if size == 0:
        raise ValueError(f"{path} is empty; `fastgpt prepare` writes it anew")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.int16)


def random_batch(
    ids: Tensor, batch_size: int, block_size: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Random windows x (B, T) of `ids`, and y (B, T), the id that follows each of theirs."""
    if len(ids) <= block_size:
        raise ValueError(
            f"a split of {len(ids)} tokens has no window of {block_size} and the token after it; "
            "use a smaller --block-size or more text"
        )
    starts = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)
    windows = ids[starts + torch.arange(block_size + 1)].long() & 0xFFFF  # (B, T + 1)
    if device.type == "cuda":  # from pinned memory the copy does not hold up the CPU
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def read_text(path: Path | None) -> str:
    """A file's text; without one Python's own documentation, which every Python carries along."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {error.start}; convert it first"
        ) from None
