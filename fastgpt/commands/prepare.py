"""`fastgpt prepare`: a text as a data folder (data.py)."""

import argparse
import pickle
from array import array
from pathlib import Path

from fastgpt.data import GPT2, Characters, Tokenizer, load_split, read_text


def prepare(text: str, out: Path, tokenizer: str = "char") -> Tokenizer:
    """Write `text` as a data folder: nine tenths to train on, the last tenth to validate."""
    characters = sorted(set(text))
    if tokenizer == "char" and len(characters) > 2**16:
        raise ValueError(
            f"the text has {len(characters)} different characters, more than the {2**16} that "
            "uint16 ids allow; use --tokenizer gpt2"
        )
    if len(text) < 20:
        raise ValueError(f"a text of {len(text)} characters is too short; use one of 20 or more")
    chosen = Characters(characters) if tokenizer == "char" else GPT2()
    out.mkdir(parents=True, exist_ok=True)
    split = int(0.9 * len(text))
    for name, part in (("train", text[:split]), ("val", text[split:])):
        with (out / f"{name}.bin").open("wb") as file:
            array("H", chosen.encode(part)).tofile(file)
    meta = out / "meta.pkl"
    if chosen.characters is None:
        meta.unlink(missing_ok=True)  # of other data that was here before
    else:
        itos = dict(enumerate(characters))
        content = {"vocab_size": len(itos), "stoi": chosen.ids, "itos": itos}
        meta.write_bytes(pickle.dumps(content))
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, help="UTF-8 text (Python's documentation)")
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), default="char")


def main(args: argparse.Namespace) -> int:
    tokenizer = prepare(read_text(args.file), args.out, args.tokenizer)
    sizes = {split: len(load_split(args.out, split)) for split in ("train", "val")}
    print(f"{args.out}: vocabulary of {tokenizer.vocab_size:,}", end="")
    print(f", {sizes['train']:,} tokens to train on, {sizes['val']:,} to validate")
    return 0
