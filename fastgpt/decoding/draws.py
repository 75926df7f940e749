"""Ids drawn from logits: nanoGPT's, and the generator is left in the same state."""

import functools
import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import checks
from fastgpt.implementations.interception import from_pytorch

_multinomial, _largest = (from_pytorch(torch, name) for name in ("multinomial", "topk"))


@dataclass(frozen=True)
class Sampling:
    temperature: float | Tensor = 1.0  # inf draws evenly; (B, 1) is one for each row
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.temperature, Tensor):
            if not (self.temperature > 0).all():
                raise ValueError(f"temperature={self.temperature} must be positive for every row")
        else:
            checks.check_kind("temperature", self.temperature, Real)
            if not self.temperature >= 0:  # NaN is not
                raise ValueError(f"temperature={self.temperature} must be 0 (argmax) or positive")
        checks.check_kind("top_k", self.top_k, Integral, or_none=True)
        checks.check_kind("top_p", self.top_p, Real, or_none=True)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps nothing; use None to keep every id")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no probability above 0; use None for every id")

    @property
    def greedy(self) -> bool:
        return not isinstance(self.temperature, Tensor) and self.temperature == 0

    @property
    def capturable(self) -> bool:
        """Whether `draw` does the same in every call, and nobody else's function has a part in it:
        then a CUDA graph can replay it. A tensor of temperatures may be another in the next call.
        """
        numbers = (self.temperature, self.top_k or 1, self.top_p or 1.0)
        plain = all(isinstance(n, int | float) for n in numbers)
        replaced = torch.multinomial is not _multinomial or torch.topk is not _largest
        return plain and (self.greedy or not replaced)

    def draw(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> ids (B, 1), consuming the generator exactly as nanoGPT does."""
        checks.check_logits(logits)
        if self.greedy:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits / self.temperature
        if self.top_k is not None:
            kept = _topk(logits, min(self.top_k, logits.size(-1)))
            kth = kept.amin(dim=-1, keepdim=True)  # no index, which the host would have to send
            logits = logits.masked_fill(logits < kth, -math.inf)  # ties with the k-th stay
        if self.top_p is not None and self.top_p < 1:
            logits = _keep_nucleus(logits, self.top_p)
        p = F.softmax(logits, dim=-1)
        return _race(p) if _may_race(p) else torch.multinomial(p, num_samples=1)


def _race(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """p (B, V) -> ids (B, 1), as torch.multinomial draws one: the largest p / e, of exponential e.

    On CUDA without its wait for the host. On a CPU e is made of the same random numbers in less
    than half the time: of 50304 ids that is 0.7 ms a token.
    """
    if p.is_cuda:
        e = torch.empty_like(p).exponential_(generator=generator)
    else:
        e = torch.empty_like(p, dtype=torch.float64).uniform_(generator=generator)
        e = e.neg_().log1p_().neg_().to(p.dtype)
    return (p / e).argmax(dim=-1, keepdim=True)


def _may_race(p: Tensor) -> bool:
    """Whether torch.multinomial is PyTorch's own; on a CPU also, whether it is known to do the same
    and would raise nothing.
    """
    if torch.multinomial is not _multinomial:
        return False
    if p.is_cuda:  # 16 bits may overflow by the temperature, which PyTorch's own notices
        return p.dtype == torch.float32
    plain = checks.can_be_read(p) and p.dtype == torch.float32 and p.is_contiguous()
    return plain and not p.amax().isnan() and _multinomial_races()


@functools.cache
def _multinomial_races() -> bool:
    """Asked of the PyTorch that is here: how it draws is nothing that it promises."""
    p = torch.full((3, 97), 1 / 97, dtype=torch.float32, device="cpu")
    one, other = (torch.Generator("cpu").manual_seed(0) for _ in range(2))
    pairs = [(_multinomial(p, 1, generator=one), _race(p, other)) for _ in range(4)]
    states = one.get_state(), other.get_state()
    return all(torch.equal(a, b) for a, b in [*pairs, states])


def _topk(logits: Tensor, k: int) -> Tensor:
    """The k largest, which PyTorch's own need not sort: a caller's function gets nanoGPT's call."""
    if torch.topk is _largest:
        return _largest(logits, k, sorted=False).values
    values, _ = torch.topk(logits, k)
    return values


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set of ids of probability top_p together (arXiv 1904.09751)."""
    ordered, ids = logits.sort(dim=-1, descending=True)
    p = F.softmax(ordered, dim=-1)
    drop = p.cumsum(dim=-1) - p >= top_p  # what comes before already adds up to top_p
    return logits.scatter(-1, ids, ordered.masked_fill(drop, -math.inf))
