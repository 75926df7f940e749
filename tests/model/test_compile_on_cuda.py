"""torch.compile on CUDA: "auto" makes the model one graph, whatever is chosen. Needs no GPU.

On a CPU "auto" decides before it asks what it asks on CUDA, so tests there see no break of these.
"""

import json
from typing import Any

import pytest

from bench.prediction import no_gpu

pytestmark = pytest.mark.skipif(no_gpu.problem() is not None, reason=str(no_gpu.problem()))


def report(script: str) -> dict[str, Any]:
    run = no_gpu.run(f"tests.model.{script}")
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_one_graph_without_a_break():
    found = report("fake_cuda")
    before, after = found["patched"]
    assert "fastgpt.gelu_forward.default" in before and after == []
    assert found["few"] == {"graphs": 1, "breaks": [], "ours": []}  # too little to do
    cases = found["traced"]
    assert len(cases) == 24
    assert {case: found for case, found in cases.items() if found["graphs"] != 1} == {}
    for case, found in cases.items():
        assert not found["breaks"], case
        left = "left to inductor" in case
        assert bool(found["ours"]) != left, case  # as it was asked
        fused = "fastgpt.add_layer_norm_forward.default" in found["ours"]  # in no module's forward
        assert fused != left, case


def test_inductor_keeps_our_operators_and_adds_little():
    """For nanoGPT's model.py it writes 217 kernels that move 27.6 GB (prediction/inductor.json)."""
    cases = report("inductor_graph")
    whole = cases["124M"]
    assert 0 < whole["kernels"] <= 120
    assert 5e8 < whole["bytes"] <= 2e9
    times = {"add_layer_norm_forward": 24, "layer_norm_forward": 1, "layer_norm_backward": 25}
    times |= {"gelu_forward": 12, "gelu_backward": 12, "add_rows_": 1}
    times |= {"packed_attention_backward": 12}  # as measured on an H200
    times |= {"cross_entropy_forward": 1, "cross_entropy_backward": 1}
    ours = {name: n for name, n in whole["operators"].items() if name.startswith("fastgpt.")}
    assert ours == {f"fastgpt.{name}.default": n for name, n in times.items()}
    # no graph changes its inputs, which would keep CUDA graphs (mode="reduce-overhead") from it
    assert not any(found["mutated"] for found in cases.values())
    for case, in_place in (("without logits", 1), ("logits in chunks", 3)):
        assert cases[case]["operators"]["fastgpt.cross_entropy_.default"] == in_place
