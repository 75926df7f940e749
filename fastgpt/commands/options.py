"""How command lines are read: `-` and `_` alike, and one line for what is not understood."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
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
    if argv[-1:] == ["--"]:
        raise ValueError("nothing follows --; leave it out")
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if not word or (equals and not value and word.startswith("--")):  # "" is also a folder: .
            raise ValueError(f"{name or (words or ['an argument'])[-1]} has an empty value")
        if word.startswith("--"):
            word = name.replace("_", "-") + equals + value
        elif _negative(word) and words and re.fullmatch(r"--[a-z0-9-]+", words[-1]):
            words[-1] += f"={word}"
            continue
        words.append(word)
    return words


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


def number(
    kind: type, least: float, most: float = math.inf, or_zero: bool = False
) -> Callable[[str], Any]:
    """A type for `add_argument`: int or float, from `least` to `most`."""
    limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{word!r:.40} is no {what}") from None
        if not (least <= value <= most or (or_zero and value == 0)):  # NaN is neither
            raise argparse.ArgumentTypeError(f"{word:.40} must be {'0 or ' * or_zero}{limits}")
        return value

    return parse


count = number(int, 0, 2**53)
seed = number(int, 0, 2**63 - 1)
