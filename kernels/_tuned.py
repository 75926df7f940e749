"""What was measured on a device: it replaces the defaults in the kernel files and in backend.py.

A device's entry holds "implementations", op -> name, and "configs", kernel and shape -> launch
configuration. SHIPPED, in tuned.json, comes from GPU sessions (`bench.gpu --install`); `fastgpt
tune` writes a file for the user's own device, which every process of the machine reads.
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
PARTS = "implementations", "configs"
_trial: dict[str, Any] = {}


def path(device_name: str) -> Path:
    """The file of `fastgpt tune`; it may not exist."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "fastgpt" / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()) + ".json")


@functools.cache
def entry(device_name: str) -> dict[str, Any]:
    """What was measured on the device, by its user or else by us; {} if nothing was."""
    shipped, users = SHIPPED.get(device_name, {}), of_user(device_name)
    return joined(shipped, users) if users else shipped


def of_user(device_name: str) -> dict[str, Any]:
    """What `fastgpt tune` has measured here; {} if nothing."""
    try:
        file = path(device_name)
    except RuntimeError:  # the user has no home folder
        return {}
    try:
        return checked(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"fastgpt: {file} is ignored ({error}); run fastgpt tune again", stacklevel=3)
        return {}


def checked(entry: Any) -> dict[str, Any]:
    """`entry`, or ValueError if it is none."""
    kinds = {"date": str} | dict.fromkeys(PARTS, dict)
    if not isinstance(entry, dict) or [k for k in kinds if not isinstance(entry.get(k), kinds[k])]:
        raise ValueError(f"no entry of fastgpt tune: it needs {', '.join(kinds)}")
    return entry


def joined(entry: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """The entry with what `newer` has measured since."""
    return newer | {part: {**entry.get(part, {}), **newer[part]} for part in PARTS}


def configured(t: Tensor, kernel: str, guess: Callable[..., Any], *shape: Any) -> Any:
    """The launch configuration of `kernel` on t's device: the measured one, else guess(*shape).

    A measured one is ignored if the kernel's settings have other names by now.
    """
    if _trial and (key := _key(kernel, shape)) in _trial:
        return _trial[key]
    return _chosen(_name(t.device) if t.is_cuda else None, kernel, guess, shape)


@functools.cache  # called before every launch
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
    """Read the files again at the next launch, as one has been written."""
    entry.cache_clear()
    _chosen.cache_clear()


def _settings(config: Any) -> list[set[str]]:
    """The names of a configuration's settings; of each, where a key stands for several."""
    return [set(one) for one in ([config] if isinstance(config, dict) else config)]


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name


@contextmanager
def trying(key: str, config: Any) -> Iterator[None]:
    """Launch the kernel of `key` with `config`, as a search does to measure a candidate."""
    _trial[key] = config
    try:
        yield
    finally:
        del _trial[key]
