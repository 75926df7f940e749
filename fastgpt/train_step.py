"""fastgpt's own training step: the fused path, weights in the matmuls' dtype, one optimizer pass.

    loss = mean over batches of model(x, y)        gradients -> AdamW (optim.py), which clips

Under autocast a training step casts every weight to bf16 and every gradient back. Here the
optimizer keeps the bf16 copies itself, in the pass that updates the fp32 weights. What remains is
nanoGPT's step: same gradients, same update.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt.config import setting
from fastgpt.devices import autocast
from fastgpt.fused.untouched import Snapshot, calls_untouched
from fastgpt.implementations.interception import interception
from fastgpt.model import GPT
from fastgpt.optim import PYTORCHS, AdamW, CheckedAdamW
from fastgpt.storage.printable import first_line

Batch = tuple[Tensor, Tensor]  # idx and targets, (B, T) int64 on the model's device
Forward = Callable[[Tensor, Tensor], tuple[Tensor | None, Any]]  # logits, loss


class TrainStep:
    """Calling it takes one optimizer step of `model`, a GPT with return_logits=False.

    `capture` records forward and backward of a batch in a CUDA graph at the first call and replays
    it from then on, for batches of that shape: no Python between kernels, which is what small
    batches wait for. `overlap` puts weight gradients on a second stream of that graph, beside
    passes over memory: the same bits, faster (an H200: 3 % at 124M), for the memory of a block's
    operands; by default wherever there is such a graph. `compile` runs the model under
    torch.compile.

    `data_parallel` averages the gradients of all processes of torch.distributed's group, which each
    call it with as many batches of their own. The loss that it returns is this process's.

    A step whose gradients are not all finite changes nothing. After `max_skipped` of them in a row
    FloatingPointError ends the training, 0 never does; a warning comes earlier.
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
        max_skipped: int = 100,
        data_parallel: bool = False,
        overlap: bool | None = None,
    ):
        self.model, self.dtype = model, dtype
        # not the head's: a fork's may have no weight of its own
        devices = (p.device for p in model.parameters() if not p.is_meta)
        self.device = next(devices, torch.device("cpu"))
        if capture and self.device.type != "cuda":
            raise ValueError(f"capture=True needs a CUDA GPU, the model is on {self.device}")
        if capture and data_parallel:
            raise ValueError("capture=True records one process's step; leave data_parallel or it")
        if capture and setting(model.config, "checkpoint_blocks"):
            raise ValueError(
                "capture=True cannot record checkpoint_blocks=True, which asks for the state of "
                "random numbers; leave one of them out"
            )
        if overlap and (compile or not capture):
            raise ValueError("overlap=True needs capture=True, and not compile=True")
        self.overlap = capture and not compile if overlap is None else overlap
        self.forward: Forward = torch.compile(model) if compile else model
        if data_parallel:  # makes the weights those of process 0, before they are copied
            devices_used = [self.device] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=devices_used)
        # what autocast casts, float64 is not among it
        lower = (torch.float32, torch.float16, torch.bfloat16) if dtype != torch.float32 else ()
        cast = [p for p in model.parameters() if p.dtype in lower and p.dtype != dtype]
        self.copies: dict[Tensor, Tensor] = {p: torch.empty_like(p, dtype=dtype) for p in cast}
        plain = model.configure_optimizers(weight_decay, lr, betas, self.device.type)
        _check_optimizer(plain, model)
        names = {p: name for name, p in model.named_parameters()}
        self.optimizer = AdamW(plain.param_groups, lr, betas, max_norm, self.copies, names)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.graph = _Graph(self) if capture else None
        # from the optimizer's step on, until whoever counts steps has counted this one and says so:
        # weights are neither those of one count nor of the other, or half of each
        self.updating = False
        self.skipped = SkippedSteps(max_skipped)

    def __call__(self, batches: Sequence[Batch], seeds: Sequence[int] | None = None) -> Tensor:
        """The mean loss, () fp32, still on the device: reading it would wait for the step.

        `seeds`, one a batch, make dropout its own affair, whatever was drawn before.
        torch.OutOfMemoryError names what to change if the batch does not fit in memory.
        """
        if not batches:
            raise ValueError("no batches: a training step needs at least one (x, y)")
        self.updating = False
        self.optimizer.copy_weights()  # of those that somebody changed since
        run = self.graph.replay if self.graph else self.micro_step
        try:
            losses = []
            for number, (x, y) in enumerate(batches):
                if seeds is not None:
                    torch.manual_seed(seeds[number])
                if isinstance(self.forward, DistributedDataParallel):  # shared once a step
                    self.forward.require_backward_grad_sync = number == len(batches) - 1
                losses.append(run(x, y, len(batches)))
        except BaseException as error:
            self._drop_gradients()  # of the batches before, which are no step's any more
            if (explained := _explained(error, batches[0][0])) is None:
                raise
            raise explained from error
        self.updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped.look(self.optimizer.skipped)
        if self.graph is None or len(batches) > 1:  # a graph writes one batch's gradients anew
            self._drop_gradients()
        return torch.stack(losses).sum()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.graph is None)  # a graph adds to them in place

    def micro_step(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        """Add the gradients of one of `count` batches -> its share of the loss."""
        self.model.matmul_copies = self.copies  # within a step only: others may change the weights
        self.model.overlaps = self.overlap
        try:
            with autocast(self.device, self.dtype):
                loss = self.forward(x, y)[1] / count
            with autocast(self.device, torch.float32):  # none, whatever the caller is in
                self.scaler.scale(loss).backward()
        finally:
            del self.model.matmul_copies, self.model.overlaps
        return loss.detach()


class SkippedSteps:
    """Warns of steps skipped in a row; `most` of them end the training, unless it is 0."""

    WARN_AFTER = 20  # a loss scale of 65536 halves 16 times before it is 1

    def __init__(self, most: int = 100):
        self.most, self.warned = most, False
        self.on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def look(self, count: Tensor | None) -> None:
        """Judge a count on the device: on a GPU some steps late, rather than wait for it."""
        if count is None:  # no step yet
            return
        if not count.is_cuda:
            self.judge(int(count))
        elif self.on_its_way is None:
            event = torch.cuda.Event()
            with torch.cuda.device(count.device):
                here = torch.empty_like(count, device="cpu", pin_memory=True)
                here.copy_(count, non_blocking=True)
                event.record()
            self.on_its_way = here, event
        elif self.on_its_way[1].query():
            here, self.on_its_way = self.on_its_way[0], None
            self.judge(int(here))

    def judge(self, count: int) -> None:
        message = (
            f"{count} steps in a row were skipped, as their gradients are not finite. Look for "
            "what made them so: a learning rate too high, weights or data that are not finite"
        )
        if 0 < self.most <= count:
            raise FloatingPointError(f"{message}. max_skipped={self.most} ends the training here")
        if count >= self.WARN_AFTER and not self.warned:
            warnings.warn(f"fastgpt: {message}", stacklevel=4)
        self.warned = count >= self.WARN_AFTER


class _Graph:
    """A micro step in a CUDA graph, on tensors that stay where they are."""

    OFTEN = 5  # recordings one after the other

    def __init__(self, step: TrainStep):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.in_a_row = 0

    def replay(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        if self.graph is None or self.recorded != self._facts() or not self.modules.unchanged():
            with torch.cuda.device(self.step.device):
                self._record(x, y, count)
            self._count_recording()
        else:
            self.in_a_row = 0
        if (x.shape, count) != (self.x.shape, self.count):
            raise ValueError(
                f"captured for {self.count} batches of {tuple(self.x.shape)} a step, got {count} "
                f"of {tuple(x.shape)}; keep the shape, or use capture=False"
            )
        assert self.graph is not None
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        for p, grad in self.grads:  # somebody may have set it to None
            p.grad = grad
        return self.loss.clone()

    def _facts(self) -> list[Any]:
        """What a recording stands on beside the model's modules: what is replaced in PyTorch,
        addresses, what needs a gradient.
        """
        parameters = self.step.model.parameters()
        addresses = ((p.data_ptr(), p.requires_grad) for p in parameters)
        return [calls_untouched(), interception(), *addresses]

    def _count_recording(self) -> None:
        self.in_a_row += 1
        if self.in_a_row == self.OFTEN:
            warnings.warn(
                f"fastgpt: a step's CUDA graph was recorded {self.OFTEN} times in a row, and that "
                "takes far longer than a replay: something in the model or its config changes in "
                "every step; keep such values elsewhere, or use capture=False",
                stacklevel=4,
            )

    def _record(self, x: Tensor, y: Tensor, count: int) -> None:
        """On the current device, whose streams these are. Until all is done there is no graph, and
        the memory of the one before is free.
        """
        self.graph, self.loss, self.grads = None, x.new_empty(0), []
        self.step.optimizer.zero_grad()
        x, y = x.clone(), y.clone()
        optimizer, aside = self.step.optimizer, torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compile and allocate before anything is recorded
            for _ in range(3):
                self.step.micro_step(x, y, count)
        torch.cuda.current_stream().wait_stream(aside)
        optimizer.zero_grad(set_to_none=count == 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            loss = self.step.micro_step(x, y, count)
        optimizer.zero_grad(set_to_none=False)
        self.grads = [(p, p.grad) for p in self.step.model.parameters() if p.grad is not None]
        self.recorded, self.modules = self._facts(), Snapshot(self.step.model)
        self.x, self.y, self.count, self.loss, self.graph = x, y, count, loss, graph


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """ValueError for one that a fork's configure_optimizers has made otherwise than nanoGPT's: its
    groups are all that TrainStep has of it.
    """
    remedy = "TrainStep takes AdamW's own step; train with a loop of your own"
    if type(optimizer) not in (CheckedAdamW, PYTORCHS):
        raise ValueError(f"configure_optimizers gave {type(optimizer).__name__}: {remedy}")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(f"the optimizer of configure_optimizers has hooks: {remedy}")
    given = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := [n for n, p in model.named_parameters() if p.requires_grad and p not in given]:
        raise ValueError(
            f"configure_optimizers left out {missing[0]}, one of {len(missing)}; set "
            "requires_grad_(False) for what shall not be trained"
        )


def _explained(error: BaseException, x: Tensor) -> RuntimeError | None:
    """PyTorch's out-of-memory errors, with what would help; None for any other."""
    if not isinstance(error, RuntimeError):
        return None
    reason = first_line(error)
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in reason:
        return None
    B, T = x.shape
    return torch.OutOfMemoryError(
        f"a batch of {B} sequences of {T} tokens does not fit in memory. Lower batch_size={B} (and "
        f"raise grad_accum by as much), lower block_size={T}, or set checkpoint_blocks=True. "
        f"{reason}"
    )
