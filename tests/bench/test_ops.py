"""The per-op benchmark refuses wrong answers, the roofline adds up, a trace is read as it is."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels_alone, ops, profiler
from bench.harness import op_cases, roofline, timeline
from bench.harness.roofline import Ceilings, Shape, Work
from bench.peers import models, training
from bench.peers.ops import Peer
from fastgpt import GPT, GPTConfig, reference
from fastgpt.optim import AdamW

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = (16, 64, 97)
H200 = roofline.KNOWN["NVIDIA H200"]


def case_of(op):
    return next(case for case in op_cases.cases(CPU, torch.float32, *SMALL) if case.op == op)


def measured(op, variants):
    return ops.measure(case_of(op), CPU, 0.01, Ceilings(1e12, 1e10, "test"), variants)


@pytest.mark.parametrize("op", [case.op for case in op_cases.cases(CPU, torch.float32, *SMALL)])
def test_kernels_pass_the_check_and_are_timed_beside_eager(op):
    rows = measured(op, ["fastgpt"])
    assert not [row["problem"] for row in rows if "problem" in row]
    assert {row["variant"] for row in rows} == {"eager", "fastgpt"}
    assert {row["direction"] for row in rows} == set(case_of(op).work)
    for row in rows:
        assert len(row["seconds"]) >= 3 and min(row["seconds"]) > 0
        seconds = row["microseconds"] / 1e6
        assert row["of_ceiling"] == pytest.approx(
            max(row["flops"] / 1e12, row["bytes"] / 1e10) / seconds
        )
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / seconds / 1e9)


def test_what_only_the_fused_path_calls_is_checked_and_timed(monkeypatch):
    rows = kernels_alone.measure(CPU, torch.float16, 16, 64, 40_000, 0.01)
    assert not [row["problem"] for row in rows if "problem" in row]
    assert len(rows) == 10 and all(row["microseconds"] > 0 for row in rows)
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", lambda self: None)
        rows = kernels_alone.measure(CPU, torch.float16, 16, 64, 40_000, 0.01)
    (refused,) = (row for row in rows if "problem" in row)
    assert refused["op"].startswith("AdamW") and "away from eager" in refused["problem"]


WRONG = {
    "one element": lambda y: y + 0.1 * (torch.arange(y.numel()).view_as(y) == 70),
    "a tile": lambda y: torch.cat([y[:12], y[12:] * 1.01]),
    "everything, slightly": lambda y: y * 1.001,
    "NaN": lambda y: torch.where(y == y.max(), y * torch.nan, y),
    "its gradient": lambda y: y.detach() + 0.999 * (y - y.detach()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_refused_a_time(monkeypatch, wrong):
    def two(op):
        bad = Peer(lambda *args: WRONG[wrong](reference.layer_norm(*args)))
        return {"eager": Peer(reference.layer_norm), "bad": bad}

    monkeypatch.setattr(ops, "peers", two)
    (row,) = [row for row in measured("layer_norm", ["bad"]) if row["variant"] == "bad"]
    assert row["problem"].startswith("ArithmeticError: tensor") and "seconds" not in row


def test_peers_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for op, peer, why in (
        ("packed_causal_attention", "SDPA cuDNN", "needs CUDA tensors"),
        ("cross_entropy", "Liger", "pip install liger-kernel"),
    ):
        (row,) = [row for row in measured(op, [peer]) if row["variant"] == peer]
        assert why in row["problem"]


def test_gradients_made_in_the_forward_are_timed_with_it_only():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy came with torch 2.13")
    chunked = "F.linear_cross_entropy, chunked"
    rows = [r for r in measured("linear_cross_entropy", [chunked]) if r["variant"] == chunked]
    assert [row.get("direction") for row in rows] == ["both"]


@pytest.mark.parametrize(
    "wrong", [["--tokens", "1500"], ["--width", "100"], ["--vocabulary", "1"], ["--seconds", "0"]]
)
def test_sizes_that_cannot_be_measured(wrong):
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    with pytest.raises(ValueError, match=f"{wrong[0]} {wrong[1]}.* must be"):
        ops.OpsRecord(parser.parse_args(["--device", "cpu", *wrong]))


def pytest_benchmark(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench/pytest_ops.py", "--benchmark-only"]
    command += ["--device=cpu", "--tokens=8", "--width=64", f"--benchmark-storage={folder}", *args]
    # not as a worker of whatever runs these tests in parallel; compiling is another test's
    # business, and threads wait for each other on a busy machine
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_pytest_benchmark_times_calls_saves_and_compares_them(tmp_path):
    pytest.importorskip("pytest_benchmark")
    only = ("-k", "test_op[layer_norm-forward", "--rounds=5")
    first = pytest_benchmark(tmp_path, *only, "--benchmark-autosave")
    assert first.returncode == 0, first.stdout
    (saved,) = tmp_path.glob("*/*.json")
    found = json.loads(saved.read_text())
    timed = {b["params"]["variant"]: b["stats"] for b in found["benchmarks"]}
    assert {"eager", "fastgpt"} <= timed.keys()
    assert all(stats["rounds"] == 5 and stats["min"] > 0 for stats in timed.values())

    for entry in found["benchmarks"]:  # as if it had taken no time
        entry["stats"]["median"] /= 1e6
    saved.write_text(json.dumps(found))
    options = ("--benchmark-compare", "--benchmark-compare-fail=median:3%")
    second = pytest_benchmark(tmp_path, *only, *options)
    assert second.returncode != 0 and "Performance has regressed" in second.stdout + second.stderr


@pytest.mark.slow
def test_pytest_benchmark_fails_what_computes_something_else(tmp_path):
    pytest.importorskip("pytest_benchmark")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from bench.peers import ops\n"
        "from fastgpt import reference\n"
        "def peers(op):\n"
        "    bad = ops.Peer(lambda *args: 1.001 * reference.layer_norm(*args))\n"
        "    return {'eager': ops.Peer(getattr(reference, op)), 'fastgpt': bad}\n"
        "ops.peers = peers\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        only = ("-k", "test_op[layer_norm-forward", "--benchmark-autosave")
        done = pytest_benchmark(tmp_path, "-p", "wrong", *only)
    assert done.returncode == 1 and "ArithmeticError: tensor" in done.stdout
    (saved,) = tmp_path.glob("*/*.json")
    timed = json.loads(saved.read_text())["benchmarks"]
    assert [b["params"]["variant"] for b in timed] == ["eager"]


@pytest.mark.parametrize(
    "sizes, tokens_per_second",  # of the contract's table
    [((12, 12, 768), 822e3), ((24, 16, 1024), 298e3), ((48, 25, 1600), 71e3)],
)
def test_the_floor_of_a_step_is_the_contracts(sizes, tokens_per_second):
    shape = Shape(*sizes, 50304, 16, 1024)
    floor = sum(roofline.by_group(list(roofline.training_step(shape)), H200).values())
    assert 16 * 1024 / floor == pytest.approx(tokens_per_second, rel=0.01)


def test_the_steps_flops_and_parameters_are_the_models():
    L, H, C, V, B, T = 3, 2, 64, 97, 2, 32
    shape = Shape(L, H, C, V, B, T, 4)
    total = sum(op.times * op.work.flops for op in roofline.training_step(shape))
    matrices = L * 12 * C * C + V * C
    assert total == 6 * B * T * matrices + 7 * L * B * T * T * C  # causal: half of 14
    with torch.device("meta"):
        model = GPT(GPTConfig(T, V, L, H, C, bias=False))
    assert shape.parameters() == sum(p.numel() for p in model.parameters())


def test_the_floor_is_the_slower_of_computing_and_moving():
    ceilings = Ceilings(flops=10.0, bandwidth=2.0, source="test")
    assert Work(20.0, 2.0).seconds(ceilings) == 2.0
    assert Work(20.0, 8.0).seconds(ceilings) == 4.0
    assert (Work(1.0, 2.0) + Work(3.0, 4.0)) == Work(4.0, 6.0)


def event(cat, name, start, duration, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": start,
            "dur": duration, "args": args}  # fmt: skip


N, C, V = 8, 64, 97
SHAPE = Shape(1, 1, C, V, 2, 4)
ON_CPU = [
    event("cpu_op", "aten::linear", 0, 100, **{"Input Dims": [[2, 4, C], [3 * C, C], []]}),
    event("user_annotation", "a range of the user's", 5, 90),
    event("cpu_op", "aten::mm", 10, 60, **{"Input Dims": [[N, C], [C, 3 * C]]}),
    event("cpu_op", "aten::mm", 200, 50, **{"Input Dims": [[V, N], [N, C]]}),
    event("cpu_op", "autograd::engine::evaluate_function: GeluBackward0", 300, 40),
    event("cpu_op", "aten::mul", 310, 10, **{"Input Dims": [[N, 4 * C], [N, 4 * C]]}),
    event("cpu_op", "aten::copy_", 350, 5),
    {"ph": "M", "name": "process_name"},
]
ON_GPU = [
    *ON_CPU,
    event("cuda_runtime", "cudaLaunchKernel", 20, 5, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 312, 5, correlation=2),
    event("cuda_runtime", "cudaMemcpyAsync", 351, 2, correlation=3),
    event("kernel", "nvjet_hsh_128x256", 1000, 100, tid=7, correlation=1),
    event("kernel", "_backward_kernel", 1130, 40, tid=7, correlation=2),
    event("gpu_memcpy", "Memcpy DtoD", 1160, 20, tid=9, correlation=3),
    event("kernel", "triton_per_fused_native_layer_norm_3", 1200, 10, tid=7, correlation=4),
]


def test_a_cpu_trace_gives_every_op_its_own_time():
    groups = timeline.by_group(timeline.spans({"traceEvents": ON_CPU}, SHAPE))
    assert {group: round(1e6 * seconds) for group, seconds in groups.items()} == {
        "qkv and proj": 100, "head": 50, "mlp": 40, timeline.OTHER: 5
    }  # fmt: skip


def test_a_gpu_trace_gives_every_kernel_to_the_op_that_launched_it():
    spans = timeline.spans({"traceEvents": ON_GPU}, SHAPE)
    assert [(s.name, s.group) for s in spans] == [
        ("nvjet_hsh_128x256", "qkv and proj"),
        ("_backward_kernel", "mlp"),
        ("Memcpy DtoD", timeline.OTHER),
        ("triton_per_fused_native_layer_norm_3", "norm"),
    ]
    idle = timeline.gaps(spans)
    assert [round(1e6 * gap.seconds) for gap in idle] == [30, 20]  # overlapping ones leave none
    assert idle[0].before == "nvjet_hsh_128x256" and idle[1].before == "Memcpy DtoD"


def test_an_empty_trace_is_an_error():
    with pytest.raises(ValueError, match="nothing ran"):
        timeline.spans({"traceEvents": []}, SHAPE)


def test_profile_of_a_step_accounts_for_its_time(tmp_path):
    config = GPTConfig(16, V, 2, 2, C, bias=False)
    run = training.Run(config, models.initial_weights(config, CPU), CPU, "float32")
    path = tmp_path / "trace.json"
    profiler.trace(training.VARIANTS["eager"](run), run, B=2, count=2, path=path)
    shape = Shape(2, 2, C, V, 2, 16, 4)
    spans = timeline.spans(json.loads(path.read_text()), shape)
    assert set(timeline.by_group(spans)) == {op.group for op in roofline.training_step(shape)} | {
        timeline.OTHER
    }
    busy = sum(span.seconds for span in spans) + sum(gap.seconds for gap in timeline.gaps(spans))
    wall = max(span.end for span in spans) - spans[0].start
    assert busy == pytest.approx(wall, rel=0.01)
    said = profiler.report(spans, shape, Ceilings(1e9, 1e9, "test"), count=2)
    assert f"step{1e3 * wall / 2:22.3f}" in said and "aten::mm" in said
