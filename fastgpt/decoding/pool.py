"""Decoders that wait for the next call: on CUDA a new one, above all its graphs, takes longer to
make than many tokens.

One for each model, and only while nobody uses it: two streams of one model have one each.
"""

from typing import Any
from weakref import WeakKeyDictionary

from fastgpt.decoding.decoder import Decoder

Key = tuple[Any, ...]
_waiting: WeakKeyDictionary[Any, tuple[Key, Decoder]] = WeakKeyDictionary()


def take(model: Any, key: Key) -> Decoder | None:
    """The model's decoder if it waits under this key; one under another key is dropped."""
    if model in _waiting and _waiting[model][0] == key:
        return _waiting.pop(model)[1]
    drop(model)
    return None


def drop(model: Any) -> None:
    """Free the decoder that waits for the model's next call: its cache, its graphs and, in another
    dtype than the model's, its copies of the weights.
    """
    if entry := _waiting.pop(model, None):
        entry[1].close()


def give_back(model: Any, key: Key, decoder: Decoder) -> None:
    drop(model)
    _waiting[model] = key, decoder
