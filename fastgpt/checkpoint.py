"""Checkpoint files: nanoGPT's ckpt.pt, read and written.

Only tensors and plain types are read from a file, nothing that could run.
"""

import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastgpt.model import GPT, GPTConfig


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a ckpt.pt, nanoGPT's or fastgpt's, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; `fastgpt train` writes one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ValueError(f"{path} is no checkpoint of a GPT: it lacks `model` or `model_args`")
    return saved


def save_checkpoint(saved: dict[str, Any], path: Path) -> None:
    """Write all of it or leave the file as it was: a full disk must not cost the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(saved, unfinished)
    os.replace(unfinished, path)


def load_model(saved: dict[str, Any]) -> GPT:
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    return model


NANOGPT_FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's fields, and of fastgpt's own those that change something: nanoGPT's loader takes no
    other name.
    """
    args = {field.name: (getattr(config, field.name), field.default) for field in fields(GPTConfig)}
    return {k: v for k, (v, default) in args.items() if k in NANOGPT_FIELDS or v != default}
