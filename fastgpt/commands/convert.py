"""`fastgpt convert`: a checkpoint into a Hugging Face folder, or back.

Converting keeps the logits; what Hugging Face has no place for (optimizer state, characters) is
dropped.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from fastgpt import weights
from fastgpt.checkpoint import load_checkpoint, load_model, model_args, save_checkpoint
from fastgpt.model import GPT, GPTConfig

_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# what nanoGPT's GPT has built in, and transformers' can be configured to do otherwise
_FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def to_hugging_face(source: Path, folder: Path) -> None:
    """Write a folder that GPT2LMHeadModel.from_pretrained loads."""
    model = load_model(load_checkpoint(source))
    cfg = model.config
    end_of_text = 50256 if cfg.vocab_size > 50256 else None  # GPT-2's
    transformers = _transformers()
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
    hf_model.save_pretrained(folder)


def from_hugging_face(folder: Path, path: Path) -> None:
    """Write a ckpt.pt that nanoGPT's sample.py, and as a start its train.py, load."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so it holds no Hugging Face model; "
            f"name a checkpoint by its file, as in {folder / 'ckpt.pt'}"
        )
    hf_model = _transformers().GPT2LMHeadModel.from_pretrained(folder)
    config = _config(hf_model.config)
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
    save_checkpoint(saved, path)


def _config(hf: Any) -> GPTConfig:
    for name, value in _FIXED.items():
        if getattr(hf, name) != value:
            raise ValueError(f"cannot convert {name}={getattr(hf, name)!r}, only {value!r}")
    if hf.activation_function not in _ACTIVATIONS:
        raise ValueError(f"cannot convert activation_function={hf.activation_function!r}, no GELU")
    if hf.n_inner not in (None, 4 * hf.n_embd):
        raise ValueError(f"cannot convert n_inner={hf.n_inner}, only 4 * n_embd={4 * hf.n_embd}")
    return GPTConfig(
        block_size=hf.n_positions,
        vocab_size=hf.vocab_size,
        n_layer=hf.n_layer,
        n_head=hf.n_head,
        n_embd=hf.n_embd,
        dropout=hf.resid_pdrop,
        gelu=_ACTIVATIONS[hf.activation_function],
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"converting needs transformers ({error}); pip install 'fastgpt[hf]'"
        ) from None
    return transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=Path, help="a checkpoint file, or a Hugging Face folder")
    parser.add_argument("dst", type=Path, help="the folder, or the checkpoint file, to write")
    parser.add_argument("--force", action="store_true", help="write even if DST exists")


def main(args: argparse.Namespace) -> int:
    if not args.src.exists():
        raise FileNotFoundError(f"no checkpoint file or Hugging Face folder {args.src}")
    if args.dst.exists() and not args.force:
        raise FileExistsError(f"{args.dst} exists; --force writes over it")
    convert = from_hugging_face if args.src.is_dir() else to_hugging_face
    convert(args.src, args.dst)
    print(f"wrote {args.dst}")
    return 0
