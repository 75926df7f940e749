"""What inductor makes of 124M's compiled training step on an H200, without one: run as a script.

By bench/prediction/no_gpu.py, in a process with its driver. Prints a JSON object: case -> what was
generated.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch._inductor import scheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.prediction import no_gpu
from fastgpt import use_backend
from tests.model import fake_cuda


@dataclass
class Generated:
    """Of inductor's forward and backward, counted."""

    kernels: int = 0  # inductor's own
    bytes: int = 0  # that they read and write
    operators: dict[str, int] = field(default_factory=dict)
    mutated: list[str] = field(default_factory=list)  # a graph that changes inputs is not replayed

    def look(self, graph: Any, code: str) -> None:
        self.mutated += sorted(graph.mutated_inputs)
        for node in graph.scheduler.nodes:
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                if name := str(getattr(node.node, "op_overload", None) or ""):
                    self.operators[name] = self.operators.get(name, 0) + 1
            elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                self.kernels += 1
                self.bytes += node.get_read_write_buffers_sizes()


CASES: dict[str, dict[str, Any]] = {
    "124M": dict(n_layer=12),
    "without logits": dict(n_layer=2, return_logits=False),
    "logits in chunks": dict(n_layer=1, return_logits=False, vocab_size=3 * 50304),
}


def generated(**changes: Any) -> Generated:
    torch._dynamo.reset()
    sizes = dict(block_size=1024, vocab_size=50304, n_head=12, n_embd=768, bias=False)
    made, found = fake_cuda.model(**sizes | changes), Generated()
    idx = fake_cuda.tokens(16, 1024)
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(made, fullgraph=True, backend=no_gpu.inductor(found.look))(idx, idx)[1]
    loss.backward()
    return found


def main() -> None:
    fake_cuda.pretend()
    no_gpu.pretend_to_inductor()
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("auto"):
        print(json.dumps({case: asdict(generated(**CASES[case])) for case in CASES}))


if __name__ == "__main__":
    main()
