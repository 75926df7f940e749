"""Checkpoint files: nanoGPT's ckpt.pt, read and written.

Only tensors and plain types are read from a file, nothing that could run. A file that fastgpt
wrote ends in a checksum of all of it (storage/seal.py); in any other file the zip's own checksums
are checked. Whatever is wrong with a file is reported with its name before a model is built.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastgpt import checks
from fastgpt.config import GPTConfig, setting
from fastgpt.model import GPT
from fastgpt.storage import files, seal
from fastgpt.storage.printable import first_line
from fastgpt.weights import bare_name

LARGEST_COUNT = 2**53  # up to which a float64 holds every integer
NANOGPT_FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")


def read(path: Path) -> Any:
    """What torch.save wrote, undamaged. ValueError names the file and what is wrong with it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint file; name the file in it")
    if not path.exists():
        convert = f"`fastgpt convert {path.parent} {path}` makes one of the sharded ones there"
        sharded = any(path.parent.glob("sharded-*"))
        remedy = convert if sharded else "`fastgpt train` writes one"
        raise FileNotFoundError(f"no checkpoint {path}; {remedy}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file, so no checkpoint; save it as one")
    try:
        file = path.open("rb")
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    with file:
        sealed = _is_whole(file, path)
        saved = _loaded(file, path)
    if isinstance(saved, dict) and saved.get("checksum") and not sealed:
        raise ValueError(f"{path} is damaged: its checksum is gone; use another checkpoint")
    return saved


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a ckpt.pt, nanoGPT's or fastgpt's, on the CPU. ValueError names what is wrong."""
    return checked(read(path), path)


def checked(saved: Any, path: Path, weights: bool = True) -> dict[str, Any]:
    """`saved`, if it is a checkpoint; without `weights`, if it is all of one but its tensors.
    ValueError says what is wrong.
    """
    try:
        _check_kinds(saved, ("model", "model_args") if weights else ("model_args",))
        saved["model_args"] |= saved.get("fastgpt", {}).get("model_args", {})
        config = _check_values(saved)
        if weights:
            check_weights(config, saved["model"])
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a GPT: {error}") from None
    return saved


def _is_whole(file: BinaryIO, path: Path) -> bool:
    if file.read(4) != b"PK\3\4":
        size = file.seek(0, 2)
        raise ValueError(
            f"{path} is no checkpoint: {'it is empty' if not size else 'no zip archive'}, where "
            "torch.save writes one; use a file that `fastgpt train` or nanoGPT wrote"
        )
    if seal.is_sealed(file, path):
        return True
    seal.check_members(file, path)
    return False


def _loaded(file: BinaryIO, path: Path) -> Any:
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{match[1]}, which could run code" if match else "something else"
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values: it holds {what}; it was not "
            "loaded. Ask for a file of weights only"
        ) from None
    except Exception as error:  # what is malformed raises anything
        raise ValueError(f"{path} is no checkpoint: {first_line(error)}") from None


def _check_kinds(saved: Any, needed: tuple[str, ...]) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not a dict")
    kinds = dict(model=dict, model_args=dict, optimizer=dict, config=dict, fastgpt=dict)
    for name, kind in kinds.items():
        if name not in saved:
            if name in needed:
                raise ValueError(f"it lacks `{name}`")
        elif not isinstance(saved[name], kind):
            type_name = type(saved[name]).__name__
            raise ValueError(f"`{name}` is a {type_name}, not a {kind.__name__}")
    if not isinstance(saved.get("fastgpt", {}).get("model_args", {}), dict):
        raise ValueError("`model_args` of `fastgpt` is no dict")


def _check_values(saved: Mapping[str, Any]) -> GPTConfig:
    """Check everything but the tensors -> the model's sizes."""
    if "iter_num" in saved:
        _check_number("iter_num", saved["iter_num"], whole=True)
    if "best_val_loss" in saved:
        _check_number("best_val_loss", saved["best_val_loss"], whole=False)
    config = config_of(saved["model_args"])
    characters = saved.get("fastgpt", {}).get("characters")
    if characters is None:
        return config
    if not isinstance(characters, list) or not all(isinstance(c, str) and c for c in characters):
        raise ValueError("`characters` is no list of characters")
    if not 0 < len(set(characters)) == len(characters) <= config.vocab_size:
        raise ValueError(
            f"it has {len(characters)} `characters`, and vocab_size={config.vocab_size}"
        )
    return config


def _check_number(name: str, value: Any, whole: bool) -> None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    kinds = int if whole else (int, float)
    no_number = not isinstance(value, kinds) or isinstance(value, bool) or value != value
    if no_number or (whole and not 0 <= value <= LARGEST_COUNT):
        raise ValueError(f"`{name}` is {value!r:.40}, not a {'count' if whole else 'number'}")


def config_of(args: Mapping[str, Any]) -> GPTConfig:
    """A `model_args` as a GPTConfig. ValueError names a field that is unknown, missing or bad."""
    known = {field.name for field in fields(GPTConfig)}
    if unknown := sorted(map(repr, set(args) - known)):
        raise ValueError(f"`model_args` has {', '.join(unknown)}, which no GPT of fastgpt's has")
    if missing := sorted(set(NANOGPT_FIELDS) - {"dropout", "bias"} - set(args)):
        raise ValueError(f"`model_args` lacks {', '.join(missing)}")
    config = GPTConfig(**args)
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, name)
        if isinstance(value, bool) or (isinstance(value, int) and value > LARGEST_COUNT):
            raise ValueError(f"{name}={value!r:.40} must be an integer up to {LARGEST_COUNT}")
    for name in ("bias", "checkpoint_blocks"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r:.40} must be True or False")
    dropout = config.dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r:.40} must be at least 0 and below 1")
    try:
        checks.check_config(config)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return config


def check_weights(config: GPTConfig, weights: Mapping[str, Any]) -> None:
    """ValueError names the first weight that is missing, left over, or of another shape."""
    named = ((bare_name(str(name)), w) for name, w in weights.items())
    stored = {name: w for name, w in named if name is not None}
    blocks = {name.split(".")[2] for name in stored if name.startswith("transformer.h.")}
    if len(blocks) != config.n_layer:  # before a list of so many names is made
        raise ValueError(f"n_layer={config.n_layer}, but `model` has {len(blocks)} blocks")
    expected = dict(shapes(config))
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"`model` lacks {name}")
        _check_tensor(name, stored[name], shape)
    if not torch.equal(stored["lm_head.weight"], stored["transformer.wte.weight"]):
        raise ValueError(
            "lm_head.weight differs from transformer.wte.weight, which are one tensor in a GPT"
        )
    if extra := sorted(set(stored) - set(expected)):
        raise ValueError(f"`model` has {extra[0]!r:.60}, which a GPT of its sizes does not have")


def _check_tensor(name: str, t: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is a {type(t).__name__}, not a tensor")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} is {tuple(t.shape)}, and `model_args` need {shape}")
    if t.layout != torch.strided or t.is_quantized or not t.is_floating_point():
        raise ValueError(f"{name} is {t.dtype} in layout {t.layout}, no plain floating point")
    # a tensor may claim more elements than the file holds, by strides of 0
    if t.is_meta or t.numel() * t.element_size() > t.untyped_storage().nbytes():
        raise ValueError(f"{name} {tuple(t.shape)} is larger than what is stored of it")
    if not t.isfinite().all():
        raise ValueError(f"{name} is not finite: the run that wrote it had diverged")


def shapes(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a GPT's state dict."""
    C = config.n_embd
    yield "transformer.wte.weight", (config.vocab_size, C)
    yield "transformer.wpe.weight", (config.block_size, C)
    layers = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    named = [
        (f"transformer.h.{i}.{name}", s)
        for i in range(config.n_layer)
        for name, s in layers.items()
    ]
    for name, shape in (*named, ("transformer.ln_f", (C,))):
        yield f"{name}.weight", shape
        if config.bias:
            yield f"{name}.bias", shape[:1]
    yield "lm_head.weight", (config.vocab_size, C)


def save_checkpoint(saved: Mapping[str, Any], path: Path) -> None:
    """Write all of it or leave the file as it was: a full disk must not cost the earlier one."""
    saved = _as_nanogpt_reads_it(saved)
    with files.replacing(path, size_of(saved)) as file:
        noting = _Noting(file)
        try:
            torch.save({**saved, "checksum": "sha256, in the comment at the end"}, noting)  # type: ignore
        except RuntimeError:
            raise noting.error or RuntimeError(f"cannot write {path}") from None
        seal.seal(file)


def _as_nanogpt_reads_it(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """nanoGPT's GPTConfig takes its own fields only; fastgpt's are stored apart from them."""
    args = saved.get("model_args", {})
    others = {name: value for name, value in args.items() if name not in NANOGPT_FIELDS}
    if not others:
        return saved
    own = {name: value for name, value in args.items() if name in NANOGPT_FIELDS}
    return {
        **saved,
        "model_args": own,
        "fastgpt": {**saved.get("fastgpt", {}), "model_args": others},
    }


class _Noting:
    """A file that remembers its OSError: torch.save raises an error of its own instead."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def size_of(saved: Any) -> int:
    """About how many bytes a file of it takes."""
    if isinstance(saved, Tensor):
        return saved.numel() * saved.element_size() + 256
    if isinstance(saved, Mapping):
        return 4096 + sum(size_of(value) for value in saved.values())
    return sum(map(size_of, saved)) if isinstance(saved, (list, tuple)) else 64


def load_model(saved: Mapping[str, Any]) -> GPT:
    model = GPT(config_of(saved["model_args"]))
    model.load_state_dict(saved["model"])
    return model


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's fields, and of fastgpt's own those that change what is computed."""
    args = {field.name: (setting(config, field.name), field.default) for field in fields(GPTConfig)}
    for name in ("return_logits", "checkpoint_blocks"):  # change how it is computed, not what
        del args[name]
    return {k: v for k, (v, default) in args.items() if k in NANOGPT_FIELDS or v != default}
