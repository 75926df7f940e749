"""Text from files and errors, made fit for a terminal."""

import unicodedata

_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible marks, halves of characters
_JOINERS = "\u200c\u200d"  # within emoji and several scripts


def printable(text: str) -> str:
    """`text` with every control character but new lines and tabs as an escape, as in \\x1b."""
    return "".join(c if _safe(c) else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its type's name if it says nothing."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)


def _safe(character: str) -> bool:
    return character in "\n\t" + _JOINERS or unicodedata.category(character) not in _UNSAFE
