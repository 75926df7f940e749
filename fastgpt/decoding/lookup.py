"""Several tokens a step by prompt lookup, speculative decoding without a second model (after arXiv
2304.04487): what followed the last ids earlier in the text is guessed to follow again.

A step of one text takes its new token and the guesses behind it, and reads the weights once for
all of them. Where a guess turns out to be the next token, its logits are there already; where not,
the next step writes over its keys and values. Logits are exact whatever was guessed, so that it
does not matter how tokens are chosen from them.
"""

import dataclasses

import torch
from torch import Tensor

from fastgpt.decoding.decoder import Decoder

MOST = 7  # guesses: with the new token 8 rows, as many as are fast in one pass over the weights
_LENGTHS = (3, 2)  # of what must have occurred before, the longer first


@dataclasses.dataclass
class PromptLookup:
    """Guess up to `tokens` ids a step; counts how many were guessed, and how many were right."""

    tokens: int
    guessed: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or not 0 < self.tokens <= MOST:
            raise ValueError(f"prompt_lookup={self.tokens!r} must be from 1 to {MOST} tokens")

    def report(self) -> str:
        share = f" ({self.right / self.guessed:.0%})" if self.guessed else ""
        return f"prompt lookup guessed {self.guessed} tokens, {self.right}{share} of them right"


class Seen:
    """Where each few ids of a text occurred last, apart from its end."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self.next: dict[tuple[int, ...], int] = {}  # ids -> the place behind them
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        end = len(self.ids)
        self.next.update({tuple(self.ids[end - n :]): end for n in _LENGTHS if n <= end})
        self.ids.append(token)

    def guess(self, count: int) -> list[int]:
        """What may follow the text: `count` ids, or none where its end is new."""
        ids = self.ids
        ends = (tuple(ids[-n:]) for n in _LENGTHS)
        start = next((self.next[end] for end in ends if end in self.next), None)
        if start is None:
            return []
        period = len(ids) - start  # a text that repeats itself goes on so
        return [ids[start + i % period] for i in range(count)]


class Ahead:
    """The steps of one text, whose prompt `ids` is in the decoder's cache."""

    def __init__(self, decoder: Decoder, lookup: PromptLookup, ids: list[int]):
        self.decoder, self.lookup, self.seen = decoder, lookup, Seen(ids)
        self.guesses: list[int] = []
        self.logits = decoder.logits[:0]  # after the last token, and after each guess

    def step(self, token: int) -> Tensor:
        """One more id -> logits (1, V), as Decoder.step."""
        self.seen.append(token)
        if self.guesses and token == self.guesses.pop(0):
            self.lookup.right += 1
            self.decoder.advance()
            self.logits = self.logits[1:]
            return self.logits[:1]
        self.guesses = self.seen.guess(min(self.lookup.tokens, self.decoder.room() - 1))
        self.lookup.guessed += len(self.guesses)
        ids = torch.tensor([token, *self.guesses], device=self.decoder.ids.device)
        self.logits = self.decoder.step(ids)
        return self.logits[:1]
