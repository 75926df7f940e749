"""Tokens from a key-value cache: a prompt in one pass, then each token as one step for every row.

A step is five calls a layer, in memory that is allocated with the cache: the norm and QKV
projection; attention with its cache write and its projection, added to the residual stream; norm,
linear and GELU; linear, added to the stream. What they run on is dispatched as the op "decode".
Rows have positions of their own: a row's tokens are those that it would get alone.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import backend, checks, ops, reference
from fastgpt.decoding import eager
from fastgpt.decoding.graphs import Graphs, capture_for, notes_pytorch
from fastgpt.decoding.parameters import Parameters, dense, hidden_size
from fastgpt.fused.block import Weights
from fastgpt.implementations import aten

KEPT = 4  # ways to draw that have graphs: a service may be asked for any number of temperatures
PATIENCE = 16  # tokens drawn so: a capture takes milliseconds, and saves a tenth of one a token


class Drawing(Protocol):
    """Hashable; equal ones draw alike."""

    def draw(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> ids (B, 1), by the same launches every time."""
        ...


class Decoder:
    """`rows` texts of up to `capacity` tokens; `parameters` as in_dtype gives them.

    A step is of one token a text. Of a single text it may be of up to `width` tokens, one after the
    other: each is a row that has the cache of all.
    """

    @torch.inference_mode(False)  # whose tensors could not be written to outside it
    def __init__(self, parameters: Parameters, rows: int, capacity: int, width: int = 1):
        assert rows == 1 or width == 1
        self.parameters = parameters
        (V, C), L, device = parameters.wte.shape, len(parameters.blocks), parameters.wte.device
        shape = (L, rows, parameters.n_head, capacity, C // parameters.n_head)
        self.keys, self.values = (
            torch.zeros(shape, dtype=parameters.dtype, device=device) for _ in range(2)
        )
        hidden = max((hidden_size(w) for w in parameters.blocks), default=0)
        wide = torch.promote_types(parameters.dtype, torch.float32)
        self.x, self.qkv, self.hidden, self.logits = (
            torch.empty(rows * width, size, dtype=wide, device=device)
            for size in (C, 3 * C, hidden, V)
        )
        self.ids = torch.zeros(rows * width, dtype=torch.int64, device=device)
        self.ahead = torch.arange(width, dtype=torch.int32, device=device)
        # at which the next token of each row goes; `next_position` is the largest of them
        self.positions = torch.zeros(rows * width, dtype=torch.int32, device=device)
        self.last, self.next_position = self.ahead.repeat(rows) + capacity - 1, 0
        self.zero = torch.zeros(rows, 1, dtype=wide, device=device)  # or NaN: checks.zero, added up
        self.run: Any = None  # chosen at the first step: a single token needs none
        self.graphs: Graphs | None = None  # of its functions
        self.drawing: dict[Drawing, Graphs] = {}  # of those and a draw, the latest at the end

    def refresh(self, parameters: Parameters) -> None:
        """Take the values of `parameters`, where they are not the model's own already, for another
        text.
        """
        self.zero.zero_()
        pairs = zip(self.parameters.tensors(), parameters.tensors(), strict=True)
        for own, new in pairs:
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    def close(self) -> None:
        """Let go of the graphs, which hold this decoder: its memory is free then, and not some time
        later.
        """
        self.graphs = None
        self.drawing.clear()

    def prefill(self, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Prompts idx (B, T), of which a row counts up to lengths[b] (all by default), from its
        left -> logits (B, V) after each row's last token.

        A causal model does not see what stands to the right: a row's padding changes nothing in it,
        and its keys are overwritten before a step can read them.
        """
        p, (B, T) = self.parameters, idx.shape
        if T == 1:  # a step reads the weights faster than GEMMs of one row
            self.positions.copy_(self.ahead)
            self.next_position = 0
            return self.step(idx[:, 0])
        x = F.embedding(idx, p.wte) + p.wpe[:T]
        x = x.to(self.x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # every dtype is chosen here
            for keys, values, w in zip(self.keys, self.values, p.blocks, strict=True):
                x = self._prefill_block(x, w, keys, values)
            if lengths is None:
                self.positions.copy_(self.ahead + T)
                last = x[:, -1]
            else:
                self.positions.copy_(lengths.clamp(max=self.keys.shape[-2] - 1) + self.ahead)
                last = x[torch.arange(B, device=x.device), lengths - 1]
            self.next_position = T
            last = ops.layer_norm(last, p.ln_f, p.ln_f_bias)
            return aten.linear(last.to(p.dtype), dense(p.head, p.dtype), None).to(x.dtype)

    def _prefill_block(self, x: Tensor, w: Weights, keys: Tensor, values: Tensor) -> Tensor:
        """x (B, T, C) through one block, as training computes it; fills the layer's cache."""
        T, dtype = x.shape[1], self.parameters.dtype

        def linear(t: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
            low = None if bias is None else bias.to(dtype)
            return aten.linear(t.to(dtype), dense(weight, dtype), low)

        qkv = linear(ops.layer_norm(x, w.ln_1, w.ln_1_bias), w.qkv, w.qkv_bias)
        _, k, v = reference.split_heads(qkv, self.parameters.n_head)
        keys[:, :, :T], values[:, :, :T] = k, v
        y = ops.packed_causal_attention(qkv, self.parameters.n_head)
        x = x + linear(y, w.attn_proj, w.attn_proj_bias)
        h = linear(ops.layer_norm(x, w.ln_2, w.ln_2_bias), w.fc, w.fc_bias)
        h = F.gelu(h, approximate=self.parameters.approximate)
        return x + linear(h, w.mlp_proj, w.mlp_proj_bias)

    def step(self, ids: Tensor) -> Tensor:
        """One more token a text, ids (B,) -> logits (B, V), which the next step overwrites.

        With a single text ids (n,) may also hold guesses of the tokens that follow, n <= width and
        no more than `room`: ids[0] is its next token, the others count only after `advance`.

        A text that is full stays so, and its logits mean nothing.
        """
        rows = len(ids)
        checks.check_ids(ids, len(self.parameters.wte))  # drawn by a function of the caller's
        self.ids[:rows].copy_(ids)
        self._do(self._steps(), rows)
        return self.logits[:rows]

    def step_and_draw(self, drawing: Drawing, ids: Tensor | None = None) -> Tensor:
        """One more token a text, ids (B,) -> the next ones (B, 1), drawn from its logits. Without
        ids it goes on from what the call before this one drew, which is on the device already.
        """
        if ids is not None:
            self.ids.copy_(ids)
        self._do(self._steps_that_draw(drawing), len(self.ids))
        return self.ids[:, None].clone()  # the next step writes over them

    def _do(self, steps: Graphs, rows: int) -> None:
        capacity = self.keys.shape[-2]
        furthest = self.next_position + rows // self.keys.shape[1] - 1
        steps(min(max(64, 1 << furthest.bit_length()), capacity), rows)
        self.next_position = min(self.next_position + 1, capacity - 1)

    def _steps(self) -> Graphs:
        if self.run is None:
            facts = dict(head_dim=self.keys.shape[-1], rows=len(self.x))
            chosen = backend.choose("decode", self.parameters.like(), **facts)
            self.run = eager if chosen is reference else chosen
        if self.graphs is None:
            device = self.x.device
            patience = int(notes_pytorch(device))  # on CUDA a first call compiles the kernels
            self.graphs = Graphs(self._forward, capture_for(device, self.run), patience=patience)
        return self.graphs

    def _steps_that_draw(self, drawing: Drawing) -> Graphs:
        """Until one is worth its capture, they are steps that do not, and the draw after them."""
        found = self.drawing.pop(drawing, None)
        if found is None:
            steps = self._steps()
            whole, parts = (
                functools.partial(self._forward_and_draw, forward, drawing)
                for forward in (self._forward, steps)
            )
            found = Graphs(whole, steps.capture, parts, PATIENCE)
        self.drawing[drawing] = found
        if len(self.drawing) > KEPT:
            del self.drawing[next(iter(self.drawing))]
        return found

    def room(self) -> int:
        """How many more tokens the longest text can have."""
        return self.keys.shape[-2] - self.next_position

    def advance(self) -> None:
        """The last step's guess of the next token was right: the guess is the next token now."""
        self.run.advance(self.positions, self.last)
        self.next_position = min(self.next_position + 1, self.keys.shape[-2] - 1)

    def _forward(self, bucket: int, rows: int) -> None:
        """All of a step that a device does, where every position is below `bucket`: the same calls
        on the same memory every time.
        """
        p, run, positions = self.parameters, self.run, self.positions[:rows]
        x, qkv = self.x[:rows], self.qkv[:rows]
        run.embed(x, self.ids[:rows], positions, p.wte, p.wpe)
        for keys, values, w in zip(self.keys, self.values, p.blocks, strict=True):
            run.linear(qkv, x, w.qkv, w.qkv_bias, (w.ln_1, w.ln_1_bias))
            run.attend_project(
                x, qkv, keys, values, positions, bucket, w.attn_proj, w.attn_proj_bias
            )
            width, norm = hidden_size(w), (w.ln_2, w.ln_2_bias)
            hidden = self.hidden.flatten()[: rows * width].view(-1, width)
            run.linear(hidden, x, w.fc, w.fc_bias, norm, None, p.approximate)
            run.linear(x, hidden, w.mlp_proj, w.mlp_proj_bias, None, x)
        run.linear(self.logits[:rows], x, p.head, None, (p.ln_f, p.ln_f_bias))
        run.advance(self.positions, self.last)

    def _forward_and_draw(
        self, forward: Callable[[int, int], None], drawing: Drawing, bucket: int, rows: int
    ) -> None:
        forward(bucket, rows)
        self.zero.add_(checks.zero(self.logits))
        self.ids.copy_(drawing.draw(self.logits)[:, 0])
