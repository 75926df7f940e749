"""fastgpt's training step without a GPU: its kernels and PyTorch ops, from a run on meta tensors.

The units of fastgpt.fused, the launchers under them and the optimizer run as in TrainStep, forward,
backward and update. Nothing is computed: launches are recorded (`_launch.record`), and every other
op is seen by a dispatch mode, which counts the bytes of what it reads and writes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.harness.roofline import Shape
from bench.harness.timeline import OTHER, matmul_groups
from bench.peers import models
from bench.peers.training import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY
from bench.prediction.kernel import ATEN, ATTENTION, GEMM, Kernel
from fastgpt import GPT, GPTConfig, backend
from fastgpt.fused import block as block_unit
from fastgpt.fused import embedding as embedding_unit
from fastgpt.fused.block import Settings, Weights
from fastgpt.fused.launchers import Launchers
from fastgpt.fused.untouched import block_weights
from fastgpt.linear_cross_entropy import mean_loss
from fastgpt.optim import AdamW

LOW = torch.bfloat16
# ops that start no kernel, besides views
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "promote_types")
# what one call is in more kernels than one, as counted in the record of an H200
_PARTS = {"sort": 8, "_scaled_dot_product_cudnn_attention_backward": 3}


def training_step(
    config: GPTConfig, B: int, arch: int, processors: int, attention: str = "cudnn"
) -> tuple[list, list]:
    """-> launches, (component, Launch) of every Triton kernel started; and the other ops, with
    those alike counted together. `attention` is one that the fused path may use (backend.OPS)."""
    from fastgpt.kernels import _launch, adamw

    with _launch.record(arch, processors) as launches, torch.device("meta"):
        with models.quietly():
            model = GPT(replace(config, return_logits=False))
        copies = {p: torch.empty_like(p, dtype=LOW) for p in model.parameters()}
        with torch.device("cpu"):  # PyTorch 2.6 imports its compiler here, which needs real tensors
            optimizer = AdamW(_groups(model), LEARNING_RATE, BETAS, CLIP, copies)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        counted = _Counted(_shape(config, B), launches)
        with _Counted(_shape(config, B), launches):  # the first step, which makes state and tables
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer._step_in_kernels(adamw, params)
        launches.clear()
        optimizer.zero_grad()
        with counted:
            run = launchers(attention, counted.labelled)
            loss = _forward(model, run, copies, counted, B)
            counted.phase = "backward"
            # not loss.backward(): it would copy a gradient that the recorded launches hold on to
            grads = torch.autograd.grad(loss, params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        with counted, counted.inside("optimizer"), torch.no_grad():
            optimizer._step_in_kernels(adamw, params)
    return list(zip(counted.components, launches, strict=True)), counted.ops()


def _shape(config: GPTConfig, B: int) -> Shape:
    sizes = config.n_layer, config.n_head, config.n_embd, config.vocab_size
    return Shape(*sizes, B, config.block_size)


def _groups(model: Any) -> list[dict[str, Any]]:
    """nanoGPT's: matrices are decayed, and nothing else."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def _forward(
    model: Any, run: Launchers, copies: dict[Any, Tensor], counted: "_Counted", B: int
) -> Tensor:
    """The chain of fused/whole.py: the loss, an fp32 scalar."""
    parts, cfg = model.transformer, model.config
    settings = Settings(cfg.n_head, cfg.gelu == "tanh", 0.0)
    idx = torch.empty(B, cfg.block_size, dtype=torch.int64)
    with counted.inside("embedding"):
        x, head = embedding_unit.embed(run.add_rows_, idx, parts.wte.weight, parts.wpe.weight)
    delta = None
    for module in parts.h:
        weights = block_weights(module, settings, cfg.n_embd)
        assert weights is not None  # of a GPT just built
        # the norms' copies are among them, and nobody reads those
        low = Weights(*(w if w is None else copies[w] for w in weights))  # type: ignore[arg-type]
        delta, x = block_unit.block(run, settings, delta, x, weights, low)
    x = block_unit.norm(run, delta, x, parts.ln_f.weight, parts.ln_f.bias, LOW)
    low_head, targets = copies[model.lm_head.weight], idx.flatten()
    return mean_loss(run.cross_entropy_, x.flatten(0, 1), head, low_head, targets, -1)


def launchers(
    attention: str, labelled: Callable[[str, Any], Any] = lambda component, run: run
) -> Launchers:
    """fastgpt's kernels, with the GEMMs of cuBLAS."""
    from fastgpt.kernels import cross_entropy, embedding, gelu, layer_norm

    held = backend.implementation("packed_causal_attention", attention)

    def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
        h = F.linear(x, w, b)
        return h, gelu.gelu_forward(h, tanh)

    def gelu_dgrad(dy: Tensor, w: Tensor, h: Tensor, tanh: bool, *options: bool) -> Any:
        return gelu.gelu_backward(dy @ w, h, tanh, *options)

    return Launchers(
        norm=labelled("norm", layer_norm.forward),
        add_norm=labelled("norm", layer_norm.add_forward),
        norm_backward=labelled("norm", layer_norm.backward),
        linear_gelu=labelled("mlp", linear_gelu),
        gelu_dgrad=labelled("mlp", gelu_dgrad),
        attention=labelled("attention", held.packed_forward),
        attention_backward=labelled("attention", held.packed_backward),
        add_rows_=labelled("embedding", embedding.add_rows_),
        cross_entropy_=labelled("loss", cross_entropy.cross_entropy_),
    )


def with_products(kernel: Kernel, launch: Any) -> Kernel:
    """With the FLOPs of attention's backward, if it is one of its kernels: causal, so half of 3 and
    of 4 products, as the scores are made in both."""
    phases = {"attention_backward.dq_kernel": 3.0, "attention_backward.dkdv_kernel": 4.0}
    if (products := phases.get(kernel.name)) is None:
        return kernel
    B, H, T, D = launch.args[0].shape
    return replace(kernel, flops=products * B * H * T * T * D)


class _Counted(TorchDispatchMode):
    """Counts PyTorch's ops, and notes the component of every op and of every launch of a kernel."""

    def __init__(self, shape: Shape, launches: list[Any]):
        super().__init__()
        self.components: list[str] = []  # of launches, as far as they are labelled
        self.phase = "forward"
        self._launches, self._groups = launches, matmul_groups(shape)
        self._rows = shape.B * shape.T
        self._counts: Counter[Kernel] = Counter()
        self._gemm: tuple[Kernel, Tensor] | None = None  # the last, and its product
        self._component = OTHER

    def ops(self) -> list[Kernel]:
        return [replace(kernel, launches=n) for kernel, n in self._counts.items() if n]

    @contextmanager
    def inside(self, component: str) -> Iterator[None]:
        before, self._component = self._component, component
        try:
            yield
        finally:
            self.components += [component] * (len(self._launches) - len(self.components))
            self._component = before

    def labelled(self, component: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with self.inside(component):
                return launcher(*args)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgpt":  # on meta tensors its fake would run, not its launcher
            raise NotImplementedError(f"{func} hides its launches; call the launcher itself")
        schema = func._schema
        if schema.name == "aten::_local_scalar_dense":  # the loss's scale, or what nobody looks at
            return 1.0
        result = func(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not view and schema.name.removeprefix("aten::") not in _FREE:
            self._count(schema, args, kwargs or {}, result)
        return result

    def _count(self, schema: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = schema.name.removeprefix("aten::")
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if name == "_to_copy" and self._gemm is not None and inputs[0] is self._gemm[1]:
            gemm, product = self._gemm  # whose product CUDA has in that dtype at once (aten.matmul)
            self._counts[gemm] -= 1
            self._counts[replace(gemm, bytes=gemm.bytes - _size(product) + _size(outputs[0]))] += 1
            return
        moved, parts = _traffic(schema, args, inputs, outputs), _PARTS.get(name, 1)
        kernel = Kernel(name, self._component, ATEN, 1, moved, parts=parts)
        if name == "mm":
            kernel = self._product(kernel, *inputs)
            self._gemm = kernel, outputs[0]
        elif "scaled_dot_product" in name:
            kernel = _attention(kernel, inputs[0])
        self._counts[kernel] += 1

    def _product(self, kernel: Kernel, a: Tensor, b: Tensor) -> Kernel:
        (M, K), N = a.shape, b.shape[1]
        phase = "forward" if self.phase == "forward" else "dgrad"
        return replace(
            kernel,
            name=f"{M}x{K}x{N}",
            component=self._groups.get(tuple(sorted((M, K, N))), OTHER),
            kind=GEMM,
            flops=2.0 * M * K * N,
            phase="wgrad" if self._rows == K else phase,
        )


def _attention(kernel: Kernel, q: Tensor) -> Kernel:
    """Causal: half of the 2 products of a forward, of the 5 of a backward."""
    B, H, T, D = q.shape
    backward = "backward" in kernel.name
    flops = (5.0 if backward else 2.0) * B * H * T * T * D
    name = kernel.name.removeprefix("_scaled_dot_product_")
    phase = "backward" if backward else "forward"
    return replace(kernel, name=name, kind=ATTENTION, flops=flops, phase=phase)


def _traffic(schema: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Bytes that an op reads and writes if each of its tensors passes once."""
    name = schema.name.removeprefix("aten::")
    if name.startswith("new_") or name.endswith("_like"):
        return float(sum(map(_size, outputs)))
    if name == "embedding":  # reads no more of its table than it writes
        return 2 * sum(map(_size, outputs)) + _size(inputs[1])
    changed = [
        t for argument, value in zip(schema.arguments, args, strict=False)
        if argument.alias_info and argument.alias_info.is_write for t in _tensors(value)
    ]  # fmt: skip
    seen = {id(t) for t in changed}
    read = sum(_size(t) for t in inputs if id(t) not in seen)
    written = sum(map(_size, changed)) + sum(_size(t) for t in outputs if id(t) not in seen)
    if name not in ("copy_", "_foreach_copy_", "fill_", "zero_"):
        read += sum(map(_size, changed))
    return float(read + written)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _size(t: Tensor) -> int:
    """Bytes of t, those of an expanded dimension once."""
    counts = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n)
    return t.element_size() * math.prod(counts)
