"""A tokenizer as Hugging Face's files, and back where it is one of characters.

The libraries are large, and imported only to exchange weights.
"""

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"


def write_characters(characters: list[str], folder: Path) -> None:
    """Token i is characters[i]: a byte-pair encoding without pairs."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    _save(tokenizer, folder)


def write_gpt2(ranks: Mapping[bytes, int], folder: Path) -> None:
    """OpenAI's, from the ranks of its tokens, as tiktoken has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = _names_of_bytes()

    def named(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    vocabulary = {named(token): rank for token, rank in ranks.items()}
    merges = [
        (named(a), named(b))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for a, b in [_parts(token, rank, ranks)]
    ]
    vocabulary[END_OF_TEXT] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _save(tokenizer, folder, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def _save(tokenizer: Any, folder: Path, **special: str) -> None:
    from transformers import PreTrainedTokenizerFast

    how: dict[str, Any] = dict(clean_up_tokenization_spaces=False, **special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **how).save_pretrained(str(folder))


def _parts(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are joined to this one: what merges of lower ranks leave of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise ValueError(f"the token {token!r} is not joined from two others")
    return parts[0], parts[1]


def _names_of_bytes() -> dict[int, str]:
    """GPT-2's: printable bytes by themselves, the others by what follows 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_characters(folder: Path, vocab_size: int) -> list[str] | None:
    """Those of a tokenizer that `write_characters` wrote; None for GPT-2's, or where there is none.
    ValueError for any other: the ids of its model mean what nothing here knows.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise ValueError
        model = json.loads(path.read_bytes())["model"]
        vocabulary, merges = model["vocab"], model["merges"]
        if merges and len(vocabulary) == 50257 and vocabulary["\u0120the"] == 262:
            return None
        characters = sorted(vocabulary, key=vocabulary.__getitem__)
        ids = [vocabulary[character] for character in characters]
        if merges or ids != list(range(len(ids))) or not 0 < len(ids) <= vocab_size:
            raise ValueError
        if not all(len(c) == 1 for c in characters):
            raise ValueError
    except Exception:  # a malformed one raises anything
        raise ValueError(
            f"{path} is no tokenizer of characters, and not GPT-2's; without the file the weights "
            "are taken alone"
        ) from None
    return characters
