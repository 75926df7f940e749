"""What a data folder holds, said by a file that is written last: prepared.json.

Before the folder's other files change it says that they are not whole yet. A folder that nanoGPT's
own prepare.py wrote has none.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastgpt.storage import files

NAME = "prepared.json"


@dataclass(frozen=True)
class Manifest:
    tokenizer: str  # "char" or "gpt2"
    vocab_size: int
    sources: str  # sha256 of what it was made from, and how
    tokens: dict[str, int] = field(default_factory=dict)  # train.bin, val.bin -> ids in it
    sha256: dict[str, str] = field(default_factory=dict)  # of each file
    whole: bool = True
    dtype: str = "uint16"

    def write(self, folder: Path) -> None:
        files.write_bytes(folder / NAME, json.dumps(asdict(self), indent=1).encode() + b"\n")

    def identity(self) -> str:
        return hashlib.sha256(repr(sorted(self.sha256.items())).encode()).hexdigest()

    def check(self, folder: Path, verify: bool) -> None:
        """ValueError unless the folder's files are as they were written: by their sizes, and to
        `verify` by their checksums, which reads them whole.
        """
        if not self.whole:
            raise ValueError(
                f"{folder} is not whole: its preparation was interrupted; run `fastgpt prepare` "
                "again"
            )
        for name, count in self.tokens.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size != 2 * count:
                raise ValueError(
                    f"{path} has {size} bytes, and was written with {2 * count}; run `fastgpt "
                    "prepare` again"
                )
            if verify and file_sha256(path) != self.sha256[name]:
                raise ValueError(
                    f"{path} is damaged: its content does not match its checksum; run `fastgpt "
                    "prepare` again"
                )
        meta = folder / "meta.pkl"
        if meta.name in self.sha256 and not meta.is_file():
            raise ValueError(
                f"no {meta}, the vocabulary of the characters in {folder}; put it back, or run "
                "`fastgpt prepare` again"
            )
        if meta.is_file() and file_sha256(meta) != self.sha256.get(meta.name):
            raise ValueError(
                f"{meta} is not the one that {folder} was prepared with; put that back, or run "
                "`fastgpt prepare` again"
            )


def load(folder: Path) -> Manifest | None:
    """None where there is no manifest. ValueError for a damaged one."""
    path = folder / NAME
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path} is no regular file; move it away, run `fastgpt prepare` again")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; run `fastgpt prepare` again") from None
    if not isinstance(content, dict) or not _fits(content):
        raise ValueError(f"{path} is damaged; run `fastgpt prepare` again")
    return Manifest(**content)


def _fits(content: dict[str, Any]) -> bool:
    if set(content) != {f.name for f in fields(Manifest)}:
        return False
    strings = all(isinstance(content[name], str) for name in ("tokenizer", "sources", "dtype"))
    tokens, sha256 = content["tokens"], content["sha256"]
    return (
        strings
        and content["dtype"] == "uint16"
        and content["tokenizer"] in ("char", "gpt2")
        and isinstance(content["vocab_size"], int)
        and isinstance(content["whole"], bool)
        and isinstance(tokens, dict)
        and set(tokens) == {"train.bin", "val.bin"}
        and all(isinstance(n, int) for n in tokens.values())
        and isinstance(sha256, dict)
        and set(tokens) <= set(sha256)
        and all(isinstance(digest, str) for digest in sha256.values())
    )


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
