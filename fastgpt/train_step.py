"""fastgpt's own training step: the fused path, weights in the matmuls' dtype, one optimizer pass.

    loss = mean over batches of model(x, y)        gradients -> AdamW (optim.py), which clips

Under autocast a training step casts every weight to bf16 and every gradient back. Here the
optimizer keeps the bf16 copies itself, in the pass that updates the fp32 weights. What remains is
nanoGPT's step: same gradients, same update.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.devices import autocast
from fastgpt.model import GPT
from fastgpt.optim import AdamW

Batch = tuple[Tensor, Tensor]  # idx and targets, (B, T) int64 on the model's device


class TrainStep:
    """Calling it takes one optimizer step of `model`, a GPT with return_logits=False.

    `capture` records forward and backward of a batch in a CUDA graph at the first call and replays
    it from then on, for batches of that shape: no Python between kernels, which is what small
    batches wait for. `compile` runs the model under torch.compile.
    """

    def __init__(
        self,
        model: GPT,
        weight_decay: float,
        lr: float,
        betas: tuple[float, float],
        max_norm: float = 1.0,
        dtype: torch.dtype = torch.float32,
        capture: bool = False,
        compile: bool = False,
    ):
        self.model, self.dtype = model, dtype
        self.forward: Callable[..., Any] = torch.compile(model) if compile else model
        self.device = model.lm_head.weight.device
        if capture and self.device.type != "cuda":
            raise ValueError(f"capture=True needs a CUDA GPU, the model is on {self.device}")
        matrices = [p for p in model.parameters() if p.dtype != dtype]
        self.copies: dict[Tensor, Tensor] = {p: torch.empty_like(p, dtype=dtype) for p in matrices}
        plain = model.configure_optimizers(weight_decay, lr, betas, self.device.type)
        self.optimizer = AdamW(plain.param_groups, lr, betas, max_norm, self.copies)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.graph = _Graph(self) if capture else None

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """The mean loss, () fp32, still on the device: reading it would wait for the step.

        RuntimeError names what to change if the batch does not fit in memory.
        """
        run = self.graph.replay if self.graph else self.micro_step
        try:
            losses = [run(x, y, len(batches)) for x, y in batches]
        except RuntimeError as error:
            raise _explained(error, batches[0][0]) from error
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.graph is None:
            self.optimizer.zero_grad()
        elif len(batches) > 1:  # one batch's gradients are written anew, several are added up
            self.optimizer.zero_grad(set_to_none=False)
        return torch.stack(losses).sum()

    def micro_step(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        """Add the gradients of one of `count` batches -> its share of the loss."""
        self.model.matmul_copies = self.copies  # within a step only: others may change the weights
        try:
            with autocast(self.device, self.dtype):
                loss = self.forward(x, y)[1] / count
            self.scaler.scale(loss).backward()
        finally:
            del self.model.matmul_copies
        return loss.detach()


class _Graph:
    """A micro step in a CUDA graph, on tensors that stay where they are."""

    def __init__(self, step: TrainStep):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    def replay(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        if self.graph is None:
            self._record(x, y, count)
        if (x.shape, count) != (self.x.shape, self.count):
            raise ValueError(
                f"captured for {self.count} batches of {tuple(self.x.shape)} a step, got {count} "
                f"of {tuple(x.shape)}; keep the shape, or use capture=False"
            )
        assert self.graph is not None
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss.clone()

    def _record(self, x: Tensor, y: Tensor, count: int) -> None:
        self.x, self.y, self.count = x.clone(), y.clone(), count
        optimizer, aside = self.step.optimizer, torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):  # compile and allocate before anything is recorded
            for _ in range(3):
                self.step.micro_step(self.x, self.y, count)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        optimizer.zero_grad(set_to_none=count == 1)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step.micro_step(self.x, self.y, count)
        optimizer.zero_grad(set_to_none=False)


def _explained(error: RuntimeError, x: Tensor) -> RuntimeError:
    """PyTorch's out-of-memory errors, with what would help; any other as it is."""
    first_line = (str(error).splitlines() or [""])[0]
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in first_line:
        return error
    B, T = x.shape
    return RuntimeError(
        f"a batch of {B} sequences of {T} tokens does not fit in memory. Lower batch_size={B} (and "
        f"raise grad_accum by as much), lower block_size={T}, or set checkpoint_blocks=True. "
        f"{first_line}"
    )
