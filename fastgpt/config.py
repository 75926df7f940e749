"""A GPT's sizes, and what fastgpt lets one choose besides."""

from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass
class GPTConfig:
    """nanoGPT's seven fields, then fastgpt's own, whose defaults change nothing."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    _: KW_ONLY  # a fork's own fields may come eighth
    # False: forward(idx, targets) returns (None, loss). "eager": it returns logits, and the head is
    # left out of the graph under torch.compile
    return_logits: bool | str = True
    gelu: str = "none"  # exact; "tanh" is what OpenAI's weights were trained with
    residual_init: float | str = "0.02/sqrt(2*n_layer)"  # see init.py for the schemes
    linear_init: float | str = 0.02
    checkpoint_blocks: bool = False  # compute a block again in the backward, instead of storing it


def setting(config: Any, name: str) -> Any:
    """One of fastgpt's own fields; of a config without it, nanoGPT's or a fork's, the default."""
    default = getattr(GPTConfig, name)
    try:
        return getattr(config, name, default)
    except KeyError:  # of a dict whose keys are attributes
        return default
