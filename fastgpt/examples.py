"""A call of every op, shaped like GPT-2's: what `info`, `tune`, the benchmarks and the GPU tests
read, so that an op is described once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Of a batch and its model: B sequences of T tokens, width C, H heads, vocabulary V."""

    B: int = 16
    T: int = 1024
    C: int = 768
    H: int = 12
    V: int = 50304


class Example(NamedTuple):
    inputs: tuple[Tensor | None, ...]  # the op's tensors, in the order of its arguments
    options: dict[str, Any]  # its other arguments
    facts: dict[str, Any]  # what dispatch asks besides (backend.choose)


Draw = Callable[..., Tensor]  # draw(*shape, scale=1.0): a tensor of N(0, scale^2)


def example(op: str, sizes: Sizes, device: torch.device | str, dtype: torch.dtype) -> Example:
    """The call of `op`, one of backend.OPS, with random inputs. KeyError if there is none."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return EXAMPLES[op](sizes, draw)


def outline(op: str, sizes: Sizes, device: torch.device | str, dtype: torch.dtype) -> Example:
    """The same with memory that nobody has written to: enough to ask dispatch."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    return EXAMPLES[op](sizes, draw)


def _layer_norm(s: Sizes, draw: Draw) -> Example:
    return Example((draw(s.B * s.T, s.C), draw(s.C), draw(s.C)), {}, dict(width=s.C))


def _add_layer_norm(s: Sizes, draw: Draw) -> Example:
    rows = draw(s.B * s.T, s.C), draw(s.B * s.T, s.C)
    return Example((*rows, draw(s.C), draw(s.C)), {}, dict(width=s.C))


def _linear(K: int, N: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Weight and bias whose outputs are about N(0, 1), where GELU and softmax bend."""
    return draw(N, K, scale=K**-0.5), draw(N)


def _linear_gelu(s: Sizes, draw: Draw) -> Example:
    return Example((draw(s.B * s.T, s.C), *_linear(s.C, 4 * s.C, draw)), {}, {})


def _mlp(s: Sizes, draw: Draw) -> Example:
    weights = *_linear(s.C, 4 * s.C, draw), *_linear(4 * s.C, s.C, draw)
    return Example((draw(s.B * s.T, s.C), *weights), {}, {})


def _causal_attention(s: Sizes, draw: Draw) -> Example:
    D = s.C // s.H
    heads = tuple(draw(s.B, s.H, s.T, D) for _ in range(3))
    return Example(heads, {}, dict(head_dim=D, dropout_p=0.0))


def _packed_causal_attention(s: Sizes, draw: Draw) -> Example:
    facts = dict(head_dim=s.C // s.H, dropout_p=0.0)
    return Example((draw(s.B, s.T, 3 * s.C),), dict(n_head=s.H), facts)


def _targets(s: Sizes, like: Tensor) -> Tensor:
    """Ids, every seventh ignored."""
    targets = torch.randint(s.V, (s.B * s.T,), device=like.device)
    targets[::7] = -1
    return targets


def _cross_entropy(s: Sizes, draw: Draw) -> Example:
    logits = draw(s.B * s.T, s.V)
    return Example((logits, _targets(s, logits)), {}, {})


def _linear_cross_entropy(s: Sizes, draw: Draw) -> Example:
    x, (weight, _) = draw(s.B * s.T, s.C), _linear(s.C, s.V, draw)
    return Example((x, weight, _targets(s, x)), {}, {})


def _block(s: Sizes, draw: Draw) -> Example:
    """Of the fused path dispatch sees the QKV projection's output."""
    return Example((draw(s.B, s.T, 3 * s.C),), {}, dict(n_head=s.H, dropout_p=0.0))


def _adamw(s: Sizes, draw: Draw) -> Example:
    """A parameter, in fp32 whatever the matmuls' dtype is."""
    return Example((draw(s.C, s.C).float(),), {}, {})


def _decode(s: Sizes, draw: Draw) -> Example:
    """Dispatch sees the head's weight."""
    return Example((draw(s.V, s.C),), {}, dict(head_dim=s.C // s.H))


EXAMPLES: dict[str, Callable[[Sizes, Draw], Example]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "linear_gelu": _linear_gelu,
    "mlp": _mlp,
    "causal_attention": _causal_attention,
    "packed_causal_attention": _packed_causal_attention,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "block": _block,
    "compiled": _block,
    "adamw": _adamw,
    "decode": _decode,
}
