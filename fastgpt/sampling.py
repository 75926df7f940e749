"""Sampling from a GPT: nanoGPT's tokens for the same seed, with a key-value cache while one is
valid.

Positions are absolute, so cached keys hold only while the context fits in block_size. Past that
nanoGPT drops the oldest token and embeds every other one a position earlier; the window is then
computed anew, as nanoGPT does. In fp32 cached logits equal the uncached ones to rounding (different
GEMM shapes); in bf16 they are as far apart as two runs of differently shaped GEMMs are.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastgpt import backend, checks, ops
from fastgpt.decoding import pool
from fastgpt.decoding.decoder import Decoder
from fastgpt.decoding.draws import Sampling
from fastgpt.decoding.graphs import notes_pytorch
from fastgpt.decoding.lookup import Ahead, PromptLookup
from fastgpt.decoding.parameters import Parameters, in_dtype, in_int8, parameters, state_of
from fastgpt.fused.untouched import Snapshot

CHECKED_EVERY = 64  # tokens on a GPU: looking for NaN waits for it
_ROOM = 1024  # tokens that a text has room for, before it needs more
_optimizer_steps = 0  # a fused optimizer writes into weights without PyTorch's counting it


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)  # once: within a step nobody can add another


def prompt_lookup(lookup: int | PromptLookup | None, rows: int) -> PromptLookup | None:
    if lookup is None:
        return None
    if rows != 1:
        raise ValueError(
            f"prompt_lookup={lookup} is for a single prompt, and there are {rows}: in a batch rows "
            "would go on by unequal numbers of tokens; generate them one by one, or leave it out"
        )
    return lookup if isinstance(lookup, PromptLookup) else PromptLookup(lookup)


@torch.no_grad()
def stream(
    model: Any,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop_token: int | None,
    dtype: torch.dtype | None = None,
    lengths: list[int] | None = None,
    watched: bool = True,
    lookup: PromptLookup | None = None,
) -> Iterator[Tensor]:
    """Columns (B, 1) of new ids after the prompts idx (B, T), each at its row's right end.
    `watched`: the caller may change the model between two columns.
    """
    (B, T), end = idx.shape, idx.size(1) + max_new_tokens
    text = _with_room(idx, min(max_new_tokens, _ROOM))
    done = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
    starts, once = [T - n for n in lengths or [T] * B], max_new_tokens == 1 < T
    next_logits = NextLogits(model, starts, end, dtype, lookup, once)
    try:
        for filled in range(T, end):
            if watched and filled > T:
                next_logits.look_again()
            new = next_logits.draw(text[:, :filled], sampling)
            if stop_token is not None:
                new = new.masked_fill(done, stop_token)
                done = done | (new == stop_token)
            if filled == text.size(1):
                text = _with_room(text, min(end, 2 * filled) - filled)
            text[:, filled : filled + 1] = new
            yield new
            if stop_token is not None and done.all():
                break
            if (filled - T) % CHECKED_EVERY == CHECKED_EVERY - 1:
                next_logits.check()
        next_logits.check()
    finally:
        next_logits.close()


@torch.inference_mode(False)  # whose tensors could not be written to outside it
def _with_room(text: Tensor, tokens: int) -> Tensor:
    """text (B, T) and behind it room for more, int64 as new ids are."""
    return torch.cat((text, text.new_zeros(len(text), tokens, dtype=torch.int64)), dim=1)


def _state(parameters: Parameters) -> Any:
    """What a decoder for them stands on."""
    return _optimizer_steps, ops.autocast_dtype(parameters.head), state_of(parameters)


def keeps(device: torch.device) -> bool:
    """Whether a decoder is worth its memory between two calls."""
    return device.type == "cuda"


class NextLogits:
    """The logits (B, V) after texts (B, T), whose earlier columns were given in the call before.

    Row b begins at column starts[b]; no text will be longer than `end`. The cache is only for a
    model as it was built, and for rows that fit in block_size; else a call is a whole forward.
    """

    def __init__(
        self,
        model: Any,
        starts: list[int],
        end: int,
        dtype: torch.dtype | None = None,
        lookup: PromptLookup | None = None,
        once: bool = False,  # there is one call, and a cache would serve nobody
    ):
        self.once = once and dtype is None and len(set(starts)) == 1
        self.model, self.starts, self.end, self.dtype = model, starts, end, dtype
        self.lookup = lookup  # for a single text
        self.ahead: Ahead | None = None
        self.parameters: Parameters | None = None
        self.seen: Snapshot | None = None
        self.state: Any = None
        self.key: pool.Key | None = None  # under which the decoder may be kept
        self.decoder: Decoder | None = None
        self.filled = 0  # columns in the decoder's cache
        self.fed = False  # the decoder has the last ids already, as it drew them
        self.zero: Tensor | float = 0.0  # or NaN, after logits on a GPU that were not finite
        self.look_again()

    def look_again(self) -> None:
        """Begin anew if the model is not what it was: every cached key is of its old weights."""
        old, seen = self.parameters, self.seen
        if old is not None and seen is not None and seen.holds() and _state(old) == self.state:
            return
        current = None if self.once else parameters(self.model)
        self.seen = None if current is None else Snapshot(self.model)
        state = None if current is None else _state(current)
        if state is None or state != self.state:
            self.parameters, self.state = current, state
            self._drop_decoder()

    def _drop_decoder(self) -> None:
        if self.decoder is not None:
            self.zero = self.zero + self.decoder.zero
            self.decoder.close()
        self.decoder, self.ahead, self.filled = None, None, 0

    def check(self) -> None:
        """RuntimeError if logits on a GPU held NaN or an infinite one, which `draw` cannot see."""
        zero = self.zero if self.decoder is None else self.zero + self.decoder.zero
        if isinstance(zero, Tensor) and zero.isnan().any():
            raise checks.not_finite()

    def draw(self, text: Tensor, sampling: Sampling) -> Tensor:
        """Ids (B, 1) drawn from them. Where a step of the decoder is a CUDA graph, they are drawn
        in that graph, and the next step finds them there. (Of a row that has met its stop token it
        then reads what was drawn and not the stop token, which changes that row only.)
        """
        if not self._draws_in_a_step(text, sampling):
            logits = self(text)
            if notes_pytorch(text.device):
                self.zero = self.zero + checks.zero(logits)
            return sampling.draw(logits)
        assert self.decoder is not None
        ids = None if self.fed else text[:, -1]
        self.filled, self.fed = text.size(1), True
        return self.decoder.step_and_draw(sampling, ids)

    def _draws_in_a_step(self, text: Tensor, sampling: Sampling) -> bool:
        return (
            notes_pytorch(text.device)
            and self._goes_on(text)
            and self.ahead is None
            and text.size(1) - min(self.starts) <= self.model.config.block_size
            and sampling.capturable
        )

    def __call__(self, text: Tensor) -> Tensor:
        self.fed = False
        T, block_size = text.size(1), self.model.config.block_size
        moved = [T - start > block_size for start in self.starts]
        if T == 0 or self.parameters is None or all(moved):
            self._drop_decoder()
            return self._whole(text, range(len(text)))
        logits = self._cached(text)
        if any(moved):
            rows = [b for b, is_moved in enumerate(moved) if is_moved]
            logits[rows] = self._whole(text, rows).to(logits.dtype)
        return logits

    def _cached(self, text: Tensor) -> Tensor:
        T, first = text.size(1), min(self.starts)
        if self._goes_on(text):
            assert self.decoder is not None
            self.filled, new = T, text[:, -1]
            return self.ahead.step(int(new)) if self.ahead else self.decoder.step(new)
        assert self.parameters is not None
        if self.decoder is None:
            self.decoder = self._new_decoder(len(text), self.end - first)
        self.filled = T
        ids, lengths = self._at_the_left(text)
        if self.lookup is not None:
            self.ahead = Ahead(self.decoder, self.lookup, ids[0].tolist())
        return self.decoder.prefill(ids, lengths)

    def _goes_on(self, text: Tensor) -> bool:
        """Whether the cache holds all of it but the last column."""
        return self.decoder is not None and self.filled == text.size(1) - 1

    @torch.inference_mode(False)  # a call outside it may have to write to the decoder's weights
    @torch.no_grad()
    def _new_decoder(self, rows: int, columns: int) -> Decoder:
        assert self.parameters is not None
        block_size, head = self.model.config.block_size, self.parameters.head
        own = ops.autocast_dtype(head)
        if self.dtype == torch.int8:
            current = in_int8(in_dtype(self.parameters, own))
        else:
            current = in_dtype(self.parameters, self.dtype or own)
        width = 1 if self.lookup is None else 1 + self.lookup.tokens
        if not keeps(head.device):
            return Decoder(current, rows, min(block_size, columns), width)
        capacity = min(block_size, 1 << (columns - 1).bit_length())
        p = self.parameters
        built = p.n_head, p.approximate, *(t.data_ptr() for t in p.tensors())
        facts = dict(head_dim=head.shape[1] // self.parameters.n_head, rows=rows * width)
        chosen = backend.explain("decode", (current.like(),), facts).implementation
        self.key = (rows, capacity, width, self.dtype, own, chosen, *built)
        if decoder := pool.take(self.model, self.key):
            decoder.refresh(current)
            return decoder
        return Decoder(current, rows, capacity, width)

    def close(self) -> None:
        """Let the next call have the decoder, where one is worth keeping."""
        if self.decoder is None:
            return
        if self.key is not None:
            pool.give_back(self.model, self.key, self.decoder)
        else:
            self.decoder.close()

    def _at_the_left(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Texts moved to their rows' left ends, cropped to block_size, and their lengths."""
        T, first = text.size(1), min(self.starts)
        if len(set(self.starts)) == 1:
            return text[:, first:], None
        width = min(T - first, self.model.config.block_size)
        starts = torch.tensor(self.starts, device=text.device)
        columns = starts[:, None] + torch.arange(width, device=text.device)
        return text.gather(1, columns.clamp(max=T - 1)), (T - starts).clamp(max=width)

    def _own_dtype(self, device_type: str) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return torch.autocast(device_type, enabled=False)
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(device_type, self.dtype) if low else nullcontext()

    def _whole(self, text: Tensor, rows: Sequence[int]) -> Tensor:
        """nanoGPT's way, a forward of the last block_size tokens; row by row where they differ."""
        first = max(0, text.size(1) - self.model.config.block_size)
        starts = [max(self.starts[b], first) for b in rows]
        with self._own_dtype(text.device.type):
            if len(set(starts)) <= 1:
                alike = text if len(rows) == len(text) else text[list(rows)]
                text = alike[:, max(starts, default=first) :].contiguous()  # a fork may view it
                return self.model(text)[0][:, -1, :]
            pairs = zip(rows, starts, strict=True)
            return torch.cat([self.model(text[[b], s:])[0][:, -1, :] for b, s in pairs])
