"""What torch.compile makes of the model on a CUDA machine, seen without one: run as a script.

Tensors that say they are on CUDA and hold no data (fake tensors), and a `torch.cuda` that answers
for an H200. Dynamo traces fastgpt's dispatch on them as it would there, line by line; nothing is
launched. Prints a JSON object: case -> graphs, graph breaks with their reasons, operators of ours;
and the last before and after F.gelu is replaced.
"""

import contextlib
import io
import itertools
import json
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.fx import GraphModule

from bench.prediction import no_gpu
from fastgpt import GPT, GPTConfig, backend, use_backend
from fastgpt.implementations import sdpa
from fastgpt.kernels import _launch

SMALL = dict(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=64)
KERNELS: dict[str, dict[str, str]] = {  # op -> implementation, as use_backend takes them
    "none chosen": {},
    "left to inductor": {"compiled": "torch"},
    "row ops chosen": dict.fromkeys(("layer_norm", "add_layer_norm", "cross_entropy"), "triton"),
    "all chosen": dict.fromkeys(backend.OPS, "triton"),
}


def pretend() -> None:
    """Answer for torch.cuda and for what fastgpt asks of it, in this process for good."""
    no_gpu.pretend()
    sdpa._would_run = lambda *_: "CUDNN_ATTENTION"
    _launch._device_problems[torch.device("cuda", 0)] = None  # it would launch a kernel to find out


def model(**changes: Any) -> nn.Module:
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        made = GPT(GPTConfig(**SMALL | changes))
    return no_gpu.on_cuda(made)


MANY = 2**17  # rows, for which the operators of a model as small as this are worth their launches


def tokens(B: int, T: int) -> Tensor:
    return torch.empty(B, T, device="cuda", dtype=torch.int64)


def traced(made: nn.Module, B: int = MANY, T: int = 16) -> dict[str, Any]:
    torch._dynamo.reset()
    idx = tokens(B, T)
    found = torch._dynamo.explain(made)(idx, idx)
    return {
        "graphs": found.graph_count,
        "breaks": [str(reason.reason)[:200] for reason in found.break_reasons],
        "ours": sorted(set().union(*map(ours, found.graphs))),
    }


def ours(graph: GraphModule) -> set[str]:
    # an autograd.Function's forward and backward are graphs inside the graph
    modules = [module for module in graph.modules() if isinstance(module, GraphModule)]
    targets = {str(node.target) for module in modules for node in module.graph.nodes}
    return {name for name in targets if name.startswith("fastgpt.")}


@torch.no_grad()
def before_and_after_a_patch() -> list[list[str]]:
    """Our operators in the graph of a compiled model, and once F.gelu is a function of a script."""
    torch._dynamo.reset()
    found = []

    def backend_that_looks(graph: GraphModule, inputs: Any) -> Any:
        found.append(sorted(ours(graph)))
        return graph.forward

    compiled, idx = torch.compile(model(), backend=backend_that_looks), tokens(MANY, 16)
    compiled(idx, idx)
    with patch.object(F, "gelu", lambda x, approximate="none": F.relu(x)):
        compiled(idx, idx)
    return found


WAYS: dict[str, dict[str, Any]] = {
    "train": dict(dropout=0.1),
    "train without logits": dict(return_logits=False),
    "eval": {},
}


def main() -> None:
    pretend()
    report = {}
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for kernels, way, autocast in itertools.product(KERNELS, WAYS, (True, False)):
            made = model(**WAYS[way]).train(way != "eval")
            with (
                use_backend("auto", **KERNELS[kernels]),
                torch.autocast("cuda", torch.bfloat16, enabled=autocast),
                torch.set_grad_enabled(way != "eval"),
            ):
                report[f"{kernels}, {way}, autocast {autocast}"] = traced(made)
        patched = before_and_after_a_patch()
        with use_backend("auto"):
            few = traced(model(), B=2)
    print(json.dumps(dict(traced=report, patched=patched, few=few)))


if __name__ == "__main__":
    main()
