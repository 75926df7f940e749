"""`fastgpt convert`: a checkpoint into a Hugging Face folder with its tokenizer, or back; and a
sharded checkpoint (train --shard) into one file.

Converting keeps the logits; what Hugging Face has no place for, as optimizer state, is dropped.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt import data, weights
from fastgpt.checkpoint import load_checkpoint, load_model, model_args, save_checkpoint, size_of
from fastgpt.commands.sample import tokenizer_of
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.storage import files, hf_tokenizer, shards
from fastgpt.storage.printable import printable
from fastgpt.training import sharded_folder
from fastgpt.training.folder import sharded


def to_hugging_face(source: Path, folder: Path) -> str:
    """Write a folder that GPT2LMHeadModel.from_pretrained loads -> what to tell about it."""
    saved = load_checkpoint(source)
    model = load_model(saved)
    cfg = model.config
    end_of_text = data.GPT2_TOKENS - 1 if cfg.vocab_size >= data.GPT2_TOKENS else None
    transformers = weights.import_transformers()
    hf_config = transformers.GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.block_size,
        n_embd=cfg.n_embd,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        activation_function={"none": "gelu", "tanh": "gelu_new"}[cfg.gelu],
        resid_pdrop=cfg.dropout,
        embd_pdrop=cfg.dropout,
        attn_pdrop=cfg.dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    hf_model = transformers.GPT2LMHeadModel(hf_config)
    exported = weights.to_hugging_face(model)
    for name, parameter in hf_model.state_dict().items():
        if name.endswith(".bias"):  # transformers has no bias=False: 0
            exported.setdefault(name, torch.zeros_like(parameter))
    hf_model.load_state_dict(exported)
    with files.replacing_folder(folder, size_of(exported)) as temporary:
        hf_model.save_pretrained(temporary)
        if not (temporary / "config.json").is_file():
            raise OSError(f"transformers wrote nothing to {temporary}")
        return _write_tokenizer(saved, source, temporary)


def _write_tokenizer(saved: Mapping[str, Any], source: Path, folder: Path) -> str:
    try:
        tokenizer = tokenizer_of(saved, source.parent)
        if isinstance(tokenizer, data.GPT2):
            hf_tokenizer.write_gpt2(tokenizer.encoding._mergeable_ranks, folder)
        else:
            hf_tokenizer.write_characters(tokenizer.characters, folder)
    except (ValueError, OSError, ImportError) as error:
        return f"; without a tokenizer: {error}"
    return " and its tokenizer"


def from_hugging_face(folder: Path, path: Path) -> str:
    """Write a ckpt.pt that nanoGPT's sample.py, and as a start its train.py, load."""
    hf_model = weights.load_folder(folder)
    config = GPTConfig(**weights.sizes_of(hf_model.config))
    model = GPT(config)
    weights.load_hugging_face(model, hf_model.state_dict())
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")  # no step taken
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args(config),
        "iter_num": 0,
        "best_val_loss": math.inf,
        "config": {},
    }
    if characters := hf_tokenizer.read_characters(folder, config.vocab_size):
        saved["fastgpt"] = {"characters": characters}
    save_checkpoint(saved, path)
    return ""


def from_shards(folder: Path, path: Path) -> str:
    """Write the one ckpt.pt of a sharded checkpoint, optimizer included."""
    saved = sharded_folder.whole(folder)
    save_checkpoint(saved, path)
    return f" of step {saved['iter_num']:,}, from {folder}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", type=Path, help="a checkpoint file, a Hugging Face folder or a sharded run's --out"
    )
    parser.add_argument("dst", type=Path, help="the folder, or the checkpoint file, to write")
    parser.add_argument("--force", action="store_true", help="write even if DST exists")
    parser.add_argument("--best", action="store_true", help="of a sharded run, not its latest")


def main(args: argparse.Namespace) -> int:
    if not args.src.exists():
        raise FileNotFoundError(f"no checkpoint file or Hugging Face folder {args.src}")
    if (args.dst.exists() or args.dst.is_symlink()) and not args.force:
        raise FileExistsError(f"{args.dst} exists; --force writes over it")
    source = _chosen(args.src, args.best)
    if source.resolve() in args.dst.resolve().parents:
        raise ValueError(f"{args.dst} is in {source}, which is converted; name another place")
    if source.is_dir():
        if args.dst.is_dir():
            raise IsADirectoryError(f"{args.dst} is a folder; name the file to write, as ckpt.pt")
        convert: Callable[[Path, Path], str] = from_shards
        if not (source / shards.INFO).exists():
            convert = from_hugging_face
    else:
        _check_replaceable(args.dst)
        convert = to_hugging_face
    more = convert(source, args.dst)
    print(printable(f"wrote {args.dst}{more}"))
    return 0


def _chosen(source: Path, best: bool) -> Path:
    """The checkpoint that is meant: of a sharded run's folder one in it."""
    if sharded(source):
        return (sharded_folder.best if best else sharded_folder.latest)(source)
    if best:
        raise ValueError(f"{source} is no sharded run's folder, of which --best takes the best")
    return source


def _check_replaceable(folder: Path) -> None:
    """--force replaces a Hugging Face folder, not whatever somebody may have named."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} holds no Hugging Face model that could be replaced")
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is in the way; a Hugging Face model is a folder")
