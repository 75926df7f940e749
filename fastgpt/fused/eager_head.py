"""The head outside the graph of torch.compile, under return_logits="eager".

Logits that leave a graph get a gradient back into it, zeros where nobody used them: a pass over
memory as long as the logits. Eager autograd passes None instead. Importing this file imports the
compiler, so model.py does it when it is traced.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.fused.untouched import plain_matmul
from fastgpt.fused.whole import fused_model


@torch.compiler.disable
def head_of_return_logits_eager(
    model: Any, idx: Tensor, x: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and loss of a GPT's last hidden states x (B, T, C), as without torch.compile.

    Its name is what PyTorch says under fullgraph=True, which this cannot be part of.
    """
    if fused := fused_model(model, idx):
        weight = model.lm_head.weight if plain_matmul(model.lm_head) else None
        return fused.head(x, weight, targets)
    logits = model.lm_head(x)
    return logits, ops.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))
