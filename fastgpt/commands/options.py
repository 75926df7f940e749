"""How command lines are read: `-` and `_` alike, and one line for what is not understood."""

import argparse
import difflib
import re
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """ValueError instead of usage and exit. Abbreviations are not guessed; near misses are told."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (.*)", message):
            message = self._unknown(match[1].split())
        if match := re.match(r"argument ([^:]+): (expected .*)", message):
            message = f"{match[1]} {match[2]}"
        raise ValueError(f"{message}; see {self.prog} --help")

    def _unknown(self, words: list[str]) -> str:
        name = next((word for word in words if word.startswith("-")), words[0]).split("=")[0]
        if not name.startswith("-"):
            return f"{name!r} is one argument too many"
        close = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.6)
        return f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else "")


def normalised(argv: list[str]) -> list[str]:
    """Options with `-` for `_`, and a negative number joined to the option before it."""
    found: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        elif _negative(word) and found and re.fullmatch(r"--[a-z0-9-]+", found[-1]):
            found[-1] += f"={word}"
            continue
        found.append(word)
    return found


def _negative(word: str) -> bool:
    if not word.startswith("-"):
        return False
    try:
        float(word)
    except ValueError:
        return False
    return True


def true_or_false(word: str) -> bool:
    """For `--name=False`, as nanoGPT spells it."""
    if word.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{word!r} is not True or False")
    return word.lower() in ("true", "1")


def folder(word: str) -> Path:
    if not word:  # which would be the current one
        raise argparse.ArgumentTypeError("'' names no folder")
    return Path(word)


def seed(word: str) -> int:
    value = count(word)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{value} must be below {2**63}")
    return value


def count(word: str) -> int:
    """A number that may be 0 but not less."""
    try:
        value = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0")
    return value
