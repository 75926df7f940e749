"""The head outside the graph of torch.compile, under return_logits="eager".

Logits that leave a graph get a gradient back into it, zeros where nobody used them: a pass over
memory as long as the logits. Eager autograd passes None instead. Importing this file imports the
compiler, so model.py does it when it is traced.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.fused.whole import fused_model


@torch.compiler.disable
def head_of_return_logits_eager(
    model: Any, idx: Tensor, x: Tensor, weight: Tensor | None, targets: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Logits and loss of what FusedModel.hidden returned, as without torch.compile.

    PyTorch's message under fullgraph=True, where this cannot be, has its name.
    """
    if fused := fused_model(model, idx):
        return fused.head(x, weight, targets)
    logits = model.lm_head(x)
    return logits, ops.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))
