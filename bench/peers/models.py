"""The models that are compared: fastgpt's, and what a user would take instead of it.

All have the same weights and nanoGPT's loss, so that losses can be compared before times are.
Hugging Face's and Liger's modules have biases where a GPT of `bias=False` has none; those are 0 and
frozen.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig
from fastgpt.weights import to_hugging_face

SIZES = {  # n_layer, n_head, n_embd, vocab_size, block_size
    "char": (4, 4, 128, 65, 128),
    "char-384": (6, 6, 384, 65, 256),  # nanoGPT's for characters on a GPU
    "124M": (12, 12, 768, 50304, 1024),
    "350M": (24, 16, 1024, 50304, 1024),
    "774M": (36, 20, 1280, 50304, 1024),
    "1.5B": (48, 25, 1600, 50304, 1024),
}
LOCAL_NANOGPT = Path(__file__).parents[2] / ".local" / "nanoGPT"
Weights = Mapping[str, Tensor]


class Absent(Exception):
    """A peer that this machine lacks; the message says how to get it."""


def config_of(size: str, block_size: int | None = None) -> GPTConfig:
    n_layer, n_head, n_embd, vocab_size, longest = SIZES[size]
    if not 0 < (block_size or longest) <= longest:
        raise ValueError(f"T={block_size} is not in 1 to {longest}, the block size of {size}")
    return GPTConfig(block_size or longest, vocab_size, n_layer, n_head, n_embd, bias=False)


def initial_weights(config: GPTConfig, device: torch.device, seed: int = 1337) -> dict[str, Tensor]:
    """A new GPT's, kept on the CPU; drawn on `device`, for a large one takes a minute elsewhere."""
    torch.manual_seed(seed)
    with quietly(), device:
        model = GPT(config)
    return {name: weight.cpu() for name, weight in model.state_dict().items()}


def gpt(config: GPTConfig, weights: Weights, device: torch.device, **changes: Any) -> GPT:
    """fastgpt's, with `changes` to the config."""
    with quietly(), device:
        model = GPT(replace(config, **changes))
    model.load_state_dict(dict(weights))
    return model


def nanogpt(config: GPTConfig, weights: Weights, device: torch.device) -> Any:
    """The checkout's GPT."""
    module = load_nanogpt()
    sizes = {name: getattr(config, name) for name in module.GPTConfig.__dataclass_fields__}
    with quietly(), device:
        model = module.GPT(module.GPTConfig(**sizes))
    model.load_state_dict(dict(weights))
    return model


def nanogpt_folder() -> Path | None:
    """The checkout of nanoGPT to compare with, from NANOGPT_DIR or else in .local; None without."""
    if named := os.environ.get("NANOGPT_DIR"):
        return Path(named)
    return LOCAL_NANOGPT if (LOCAL_NANOGPT / "model.py").is_file() else None


def load_nanogpt() -> ModuleType:
    """The checkout's model.py, under a name of its own: nothing else imports it by accident."""
    folder = nanogpt_folder()
    if folder is None:
        raise Absent(
            "no nanoGPT: set NANOGPT_DIR to a checkout of it, or put one in .local/nanoGPT"
        )
    path, name = folder / "model.py", "bench._nanogpt"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # for any path that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and torch.compile look for it
    try:
        spec.loader.exec_module(module)
        _ = module.GPT, module.GPTConfig.__dataclass_fields__
    except Exception as error:
        named = "NANOGPT_DIR=" if os.environ.get("NANOGPT_DIR") else ""
        raise ValueError(
            f"{named}{folder} is not a checkout of nanoGPT: importing its model.py gives "
            f"{type(error).__name__}: {error}"
        ) from None
    return module


def check_nanogpt() -> None:
    """ValueError if there is a folder and it is not nanoGPT's; without one the peer is absent."""
    with contextlib.suppress(Absent):
        load_nanogpt()


def hugging_face(config: GPTConfig, weights: Weights, device: torch.device) -> Any:
    """transformers' GPT2LMHeadModel, with PyTorch's SDPA as it comes."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Absent(f"no transformers ({error}): pip install transformers") from None
    settings: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu",  # exact, as in nanoGPT
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with quietly(), device:
        model = GPT2LMHeadModel(GPT2Config(**settings))
    transposed = to_hugging_face(gpt(config, weights, device))
    _load_with_frozen_biases(model, transposed)
    return model


class HuggingFaceLoss(nn.Module):
    """Called as nanoGPT's GPT: transformers shifts the labels itself unless they come shifted."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        out = self.model(idx, labels=targets, shift_labels=targets, use_cache=False)
        return None, out.loss


class Liger(nn.Module):
    """nanoGPT's GPT with Liger's LayerNorm, and its cross entropy, fused with the head or not.

    Liger has no GPT-2 and no kernel for a plain GELU; this is what its users assemble.
    """

    def __init__(self, config: GPTConfig, weights: Weights, device: torch.device, fused: bool):
        super().__init__()
        try:
            from liger_kernel.transformers import functional
            from liger_kernel.transformers.layer_norm import LigerLayerNorm
        except ImportError as error:
            raise Absent(f"no Liger ({error}): pip install liger-kernel") from None
        self.fused, self.functional = fused, functional
        self.gpt = nanogpt(config, weights, device)
        with device:
            for block in self.gpt.transformer.h:
                block.ln_1 = LigerLayerNorm(config.n_embd, eps=1e-5)
                block.ln_2 = LigerLayerNorm(config.n_embd, eps=1e-5)
            self.gpt.transformer.ln_f = LigerLayerNorm(config.n_embd, eps=1e-5)
        _load_with_frozen_biases(self.gpt, dict(weights))

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        parts, head = self.gpt.transformer, self.gpt.lm_head
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in parts.h:
            x = block(x)
        rows, targets = parts.ln_f(x).view(-1, x.size(-1)), targets.reshape(-1)
        if self.fused:
            cross_entropy = self.functional.liger_fused_linear_cross_entropy
            return None, cross_entropy(rows, head.weight, targets)
        return None, self.functional.liger_cross_entropy(F.linear(rows, head.weight), targets)


def versions() -> dict[str, str]:
    """Of the peers that fastgpt.environment.versions does not know."""
    peers = {"nanogpt": "not installed"}
    folder = nanogpt_folder()
    if folder and (model := folder / "model.py").is_file():
        peers["nanogpt"] = f"model.py sha256 {hashlib.sha256(model.read_bytes()).hexdigest()[:12]}"
    try:
        peers["liger-kernel"] = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        peers["liger-kernel"] = "not installed"
    return peers


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The models introduce themselves on stdout."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _load_with_frozen_biases(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name not in weights:
            assert name.endswith(".bias"), name
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
            weights[name] = parameter.detach()
    model.load_state_dict(weights)
