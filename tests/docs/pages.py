"""The pages of the project, and the blocks and commands in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
ALSO = [ROOT / "bench/README.md", ROOT / "kernels/README.md", ROOT / "CHANGELOG.md"]
PROGRAMS = ("fastgpt", "make", "python", "pip", "torchrun")


class Block(NamedTuple):
    language: str  # "" where none is named: a tree, an output
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*pair) for pair in found]


def of(page: Path, language: str) -> str:
    """All blocks of a language, one below another: a page is read from its top."""
    return "\n".join(block.text for block in blocks(page) if block.language == language)


def inline(page: Path) -> list[list[str]]:
    """`commands` in sentences and tables, as words."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [span.split() for span in re.findall(r"`([^`\n]+)`", prose)]
    return [words for words in spans if len(words) > 1 and words[0] in PROGRAMS]


def links(page: Path) -> list[str]:
    """Those that point into the tree."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [link for link in found if "://" not in link]
