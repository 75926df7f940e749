"""Decoders that wait for the next call: on CUDA what is in one, its graphs above all, takes longer
to make than many tokens.

One for each model, and only while nobody uses it: two streams of one model have one each.
"""

from typing import Any
from weakref import WeakKeyDictionary

from fastgpt.decoding.decoder import Decoder

Key = tuple[Any, ...]
_waiting: WeakKeyDictionary[Any, tuple[Key, Decoder]] = WeakKeyDictionary()


def take(model: Any, key: Key) -> Decoder | None:
    """The one that was kept under this key; another of this model is of no use any more."""
    found = _waiting.pop(model, None)
    return found[1] if found is not None and found[0] == key else None


def give_back(model: Any, key: Key, decoder: Decoder) -> None:
    _waiting[model] = key, decoder
