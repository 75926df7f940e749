"""What inductor makes of 124M's compiled training step on an H200, without one: run as a script.

fake_cuda.py's tensors go through Dynamo, AOTAutograd and inductor, which stops where it has written
the code. Autograd asks the driver besides torch.cuda, which no_gpu.c answers, built as libcuda.so.1
and preloaded by test_compile_on_cuda.py. Prints a JSON object: case -> what was generated.
"""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
import torch._inductor.config
import triton
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, scheduler
from torch._inductor.fx_passes import fuse_attention, pad_mm
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from fastgpt import use_backend
from tests.model import fake_cuda

DEVICE = SimpleNamespace(
    **vars(fake_cuda.H200),
    total_memory=141 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)


class Driver:
    """Triton's, as far as it is asked while code is written."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def is_active() -> bool:
        return True


class Stop(Exception):
    """The code is written, and would be compiled next."""


class Generated:
    """A backend for torch.compile: inductor up to its code, which is counted; then the graph."""

    def __init__(self) -> None:
        self.kernels = self.bytes = 0  # inductor's own, and what they read and write
        self.operators: Counter[str] = Counter()
        self.mutated: list[str] = []  # inputs: a graph that changes one is not replayed

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=self._up_to_the_code)

    def _up_to_the_code(self, graph: Any, inputs: Any, **options: Any) -> Any:
        codegen = GraphLowering.codegen

        def count_and_stop(lowered: GraphLowering) -> None:
            codegen(lowered)
            self._count(lowered)
            raise Stop

        with patch.object(GraphLowering, "codegen", count_and_stop):
            try:
                compile_fx.compile_fx_inner(graph, inputs, **options)
            except Exception as error:
                if Stop.__name__ not in repr(error):
                    raise
        return make_boxed_func(graph.forward)

    def _count(self, graph: GraphLowering) -> None:
        self.mutated += sorted(graph.mutated_inputs)
        for node in graph.scheduler.nodes:
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                if operator := getattr(node.node, "op_overload", None):
                    self.operators[str(operator)] += 1
            elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                self.kernels += 1
                self.bytes += node.get_read_write_buffers_sizes()


CASES: dict[str, dict[str, Any]] = {
    "124M": dict(n_layer=12),
    "without logits": dict(n_layer=2, return_logits=False),
    "logits in chunks": dict(n_layer=1, return_logits=False, vocab_size=3 * 50304),
}


def pretend() -> None:
    """In this process for good."""
    fake_cuda.pretend()
    torch.cuda._get_device_properties = lambda _: DEVICE
    triton.runtime.driver.set_active(Driver())
    # patterns of attention and padded products are tried on tensors made for that
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *_, **__: None
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False


def generated(**changes: Any) -> Generated:
    torch._dynamo.reset()
    sizes = dict(block_size=1024, vocab_size=50304, n_head=12, n_embd=768, bias=False)
    made, found = fake_cuda.model(**sizes | changes), Generated()
    idx = fake_cuda.tokens(16, 1024)
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(made, fullgraph=True, backend=found)(idx, idx)[1]
    loss.backward()
    return found


def main() -> None:
    pretend()
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("auto"):
        print(json.dumps({case: vars(generated(**CASES[case])) for case in CASES}))


if __name__ == "__main__":
    main()
