"""What was measured on a device goes before what the kernel files and backend.py guess.

A device's entry holds "implementations", op -> name, and "configs", kernel and shape -> launch
configuration. SHIPPED, in tuned.json, comes from GPU sessions (`bench.gpu --install`); `fastgpt
tune` writes a file for the user's own device, which all processes of a machine read alike.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch.cuda.get_device_name() -> entry, with its "date"
SHIPPED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("tuned.json").read_text())
_trial: dict[str, Any] = {}


def path(device_name: str) -> Path:
    """The file of `fastgpt tune`; it may not exist."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "fastgpt" / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()) + ".json")


@functools.cache
def entry(device_name: str) -> dict[str, Any]:
    """{} for a device that nobody has measured."""
    file = path(device_name)
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return SHIPPED.get(device_name, {})
    except (OSError, ValueError) as error:
        warnings.warn(f"fastgpt: {file} is ignored ({error}); run fastgpt tune again", stacklevel=2)
        return SHIPPED.get(device_name, {})


def configured(t: Tensor, kernel: str, guess: Callable[..., Any], *shape: Any) -> Any:
    """The launch configuration of `kernel` where `t` lives: measured, or guess(*shape). What was
    measured of a kernel that has other settings by now is no more than a guess either.
    """
    if _trial and (key := _key(kernel, shape)) in _trial:
        return _trial[key]
    return _chosen(_name(t.device) if t.is_cuda else None, kernel, guess, shape)


@functools.cache  # asked in front of every launch
def _chosen(
    device_name: str | None, kernel: str, guess: Callable[..., Any], shape: tuple[Any, ...]
) -> Any:
    guessed = guess(*shape)
    if device_name is not None:
        measured = entry(device_name).get("configs", {}).get(_key(kernel, shape))
        if measured is not None and _settings(measured) == _settings(guessed):
            return measured
    return guessed


def _key(kernel: str, shape: tuple[Any, ...]) -> str:
    return " ".join([kernel, *(str(part).removeprefix("torch.") for part in shape)])


def forget() -> None:
    """Read the files again: one has been written."""
    entry.cache_clear()
    _chosen.cache_clear()


def _settings(config: Any) -> list[set[str]]:
    """The names in a configuration, or in each of the several that one key may stand for."""
    return [set(one) for one in ([config] if isinstance(config, dict) else config)]


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name


@contextmanager
def trying(key: str, config: Any) -> Iterator[None]:
    """Launch with `config` wherever `key` is asked for: how a search measures candidates."""
    _trial[key] = config
    try:
        yield
    finally:
        del _trial[key]
