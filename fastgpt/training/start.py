"""What a run starts from: a new model, a checkpoint of its own, or somebody's weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import checkpoint, data, weights
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.storage import hf_tokenizer
from fastgpt.training.config import SHAPE, TrainConfig, option


class Start(NamedTuple):
    model_args: dict[str, Any]
    weights: Mapping[str, Tensor] | None  # None: drawn from the seed


def new(config: TrainConfig, tokenizer: data.Tokenizer) -> Start:
    args = {name: getattr(config, name) for name in (*SHAPE, "dropout")}
    return Start({"vocab_size": tokenizer.vocab_size, **args}, None)


def resumed(config: TrainConfig, tokenizer: data.Tokenizer, saved: Mapping[str, Any]) -> Start:
    args = dict(saved["model_args"], dropout=config.dropout)
    for name in SHAPE:
        before = args.get(name, getattr(GPTConfig, name))
        if getattr(config, name) != before:
            raise ValueError(
                f"{name}={getattr(config, name)}, but the checkpoint in {config.out} has "
                f"{name}={before}; go on with that, or train a new model in another --out"
            )
    check_vocabulary(tokenizer, saved, f"the checkpoint in {config.out}", config.data)
    return Start(args, saved.get("model"))  # a sharded one's are read later


def initialised(config: TrainConfig, tokenizer: data.Tokenizer, explicit: frozenset[str]) -> Start:
    """From `config.init_from`; `explicit` names the settings that somebody asked for."""
    source = config.init_from
    assert source is not None
    path = Path(source)
    if path.is_file():
        saved = checkpoint.load_checkpoint(path)
        check_vocabulary(tokenizer, saved, source, config.data)
        args, tensors = dict(saved["model_args"]), dict(saved["model"])
    elif path.is_dir() or source in weights.SIZES:
        model = GPT.from_pretrained(source)
        saved = {"model_args": checkpoint.model_args(model.config)}
        if characters := hf_tokenizer.read_characters(path, model.config.vocab_size):
            saved["fastgpt"] = {"characters": characters}
        check_vocabulary(tokenizer, saved, source, config.data)
        args, tensors = dict(saved["model_args"]), dict(model.state_dict())
    else:
        raise ValueError(
            f"init_from={source!r} is no file or folder that exists, and none of "
            f"{', '.join(weights.SIZES)}"
        )
    for name in SHAPE:
        before = args.get(name, getattr(GPTConfig, name))
        wanted = getattr(config, name)
        cropped = name == "block_size" and wanted < before
        if name in explicit and wanted != before and not cropped:
            raise ValueError(f"{option(name)} {wanted}, but {source} has {before}; leave it out")
    if "block_size" in explicit and config.block_size < args["block_size"]:
        args["block_size"] = config.block_size
        for name, weight in tensors.items():
            if name.endswith("transformer.wpe.weight"):
                tensors[name] = weight[: config.block_size].clone()
    return Start(args | {"dropout": config.dropout}, tensors)


def check_vocabulary(
    tokenizer: data.Tokenizer, saved: Mapping[str, Any], source: str, folder: str
) -> None:
    """ValueError unless the data's ids mean what the ids meant that `saved` was trained on."""
    size, extras = saved["model_args"]["vocab_size"], saved.get("fastgpt", {})
    remedy = "use the data it was trained on, or others prepared with the same vocabulary"
    known = "characters" in extras
    if known and extras["characters"] != tokenizer.characters:
        now, before = (
            "GPT-2's vocabulary" if c is None else f"a vocabulary of {len(c)} characters"
            for c in (tokenizer.characters, extras["characters"])
        )
        now = now.replace("a ", "another ", 1) if now == before else now
        raise ValueError(f"{folder} has {now}, {source} {before}; {remedy}")
    needed = tokenizer.vocab_size if tokenizer.characters is not None else data.GPT2_TOKENS
    fits = size >= needed if known or tokenizer.characters is None else size == needed
    if not fits:
        raise ValueError(
            f"{folder} has a vocabulary of {tokenizer.vocab_size}, {source} one of {size}; {remedy}"
        )


def check_fits(config: GPTConfig, settings: TrainConfig, device: torch.device) -> None:
    """ValueError for a model or a batch that no memory of this machine holds."""
    C, L, V, T = config.n_embd, config.n_layer, config.vocab_size, config.block_size
    # weights, gradients and moments; and Python's modules
    state = 16 * weights.count_parameters(L, C, V, T) + 100_000 * L
    streams = 4 * settings.batch_size * T * C * L  # what the blocks hand on, at the least
    batches = 8 * settings.batch_size * (T + 1) * settings.grad_accum
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = machine
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if settings.shard:
        state, memory = state // 4, machine
    for needed, most, what in (
        (state, memory, f"a model of n_layer={L}, n_embd={C}, vocab_size={V}, block_size={T}"),
        (streams, memory, f"a batch of batch_size={settings.batch_size}, block_size={T}"),
        (batches, machine, f"grad_accum={settings.grad_accum} batches"),
    ):
        if needed > most:
            raise ValueError(
                f"{what} needs at least {needed / 1e9:,.0f} GB, there are {most / 1e9:,.0f}; "
                "use smaller ones"
            )
