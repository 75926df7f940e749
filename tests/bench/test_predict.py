"""A predicted step is the step that fastgpt takes, and costs no more than it once did."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import predict
from bench.harness import roofline
from bench.harness.roofline import shape_of
from bench.prediction import inductor, ir, machine_code, model, no_gpu, step
from bench.prediction.kernel import ATTENTION, GEMM, TRITON, Kernel
from bench.prediction.model import GPUS
from fastgpt import GPTConfig, use_backend
from fastgpt.commands import sass
from fastgpt.fused.launchers import of_kernels as chosen

triton = pytest.importorskip("triton", reason="what is predicted are its kernels")
mlp = pytest.importorskip("fastgpt.kernels.mlp")

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
bounded = pytest.mark.skipif(VERSION < (3, 6), reason="the bounds are for Triton 3.6 and later")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "prediction.md"
H200 = GPUS["H200"]
# Of 124M at B=16: GB that our kernels move, by component. Lower them when something was won.
MOST_GIGABYTES = {
    "norm": 8.9, "mlp": 7.3, "loss": 3.3, "embedding": 0.16, "optimizer": 4.3, "attention": 3.7
}  # fmt: skip
MOST_LAUNCHES = 340  # with those of PyTorch
MOST_LIVE = 27e6  # bytes that wait in L2 for a second reading, of any kernel
LEAST_RATIO = 1.07
# In a process of its own: here the interpreter may have taken the compiler's place.
SCRIPT = """
import json
from bench import predict
from bench.harness import record
from bench.prediction import page
from bench.prediction.model import GPUS

p = predict.predict("124M", 16, GPUS["H200"])
others = [p._replace(gpu=gpu) for name, gpu in GPUS.items() if name != "H200"]
sizes = [p._replace(size=size, B=B) for size, B in page.GOALS if (size, B) != ("124M", 16)]
text = page.page(p, others, sizes, record.load_all())
print(json.dumps(predict.as_json(p) | {"table": predict.table(p), "page": text}))
"""


@pytest.fixture(scope="module")
def predicted():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@bounded
def test_what_was_won_is_kept(predicted):
    own = [row for row in predicted["kernels"] if row["kind"] == TRITON]
    for component, most in MOST_GIGABYTES.items():
        rows = [row for row in own if row["component"] == component]
        assert 0 < sum(row["launches"] * row["bytes"] for row in rows) <= 1e9 * most, component
    assert {row["component"] for row in own} == set(MOST_GIGABYTES)
    assert not any(row["spills"] for row in own)
    assert max(row["live_bytes"] for row in own) <= MOST_LIVE
    (loss,) = (row for row in own if row["component"] == "loss")
    assert loss["live_bytes"] == 2 * 132 * 2 * 50304  # of bf16 rows, two on a multiprocessor
    assert sum(row["launches"] * row["parts"] for row in predicted["kernels"]) <= MOST_LAUNCHES
    assert predicted["ratio"] >= LEAST_RATIO


def test_the_parts_add_up(predicted):
    for side in ("kernels", "compile_kernels"):
        rows = predicted[side]
        us = sum(row["launches"] * (row["microseconds"] + model.GAP * row["parts"]) for row in rows)
        drawn = sum(
            row["launches"] * row["microseconds"]
            * model.DRAW["products" if row["flops"] else "the rest"]
            for row in rows
        )  # fmt: skip
        told = predicted["ours_ms" if side == "kernels" else "compile_ms"]
        assert max(us, drawn) == pytest.approx(1e3 * told, rel=1e-3)
        for row in (row for row in rows if row["kind"] == TRITON):
            assert row["registers"] > 0 and row["instructions_per_element"] > 1
            assert row["programs_per_sm"] > 0 and row["vector_bits"] in (8, 16, 32, 64, 128)
    assert predicted["ratio"] == pytest.approx(predicted["compile_ms"] / predicted["ours_ms"])
    assert predicted["compile_source"]["torch"] in predicted["table"]


@bounded
def test_the_page_is_of_this_step(predicted):
    """Its headings and rows; the figures in them depend on Triton's version."""

    def outline(text):
        lines = [line.split(" | ")[0] for line in text.splitlines() if line.startswith(("#", "|"))]
        return [re.sub(r"[\d.,]+", "#", line) for line in lines]

    again = "run python -m bench.prediction.page"
    assert outline(PAGE.read_text()) == outline(predicted["page"]), again


@pytest.fixture(scope="module")
def counted():
    launches, ops = step.training_step(GPTConfig(48, 320, 2, 4, 128, bias=False), 2, 90, 132)
    return launches, ops, roofline.Shape(2, 4, 128, 320, 2, 48)


def test_products_are_those_of_the_roofline(counted):
    """And attention: two counts of the same step, one by hand, one by running it."""
    _, ops, shape = counted
    for kind, groups in ((GEMM, ("qkv and proj", "mlp", "head")), (ATTENTION, ("attention",))):
        for group in groups:
            flops = sum(k.launches * k.flops for k in ops if (k.kind, k.component) == (kind, group))
            by_hand = [op for op in roofline.training_step(shape) if op.group == group]
            assert flops == sum(op.times * op.work.flops for op in by_hand), group


def test_launches_are_those_of_a_step(counted):
    launches, ops, shape = counted
    names = [launch.kernel.fn.__name__ for _, launch in launches]
    norms = 2 * shape.n_layer + 1
    assert names.count("_backward_kernel") == names.count("_forward_kernel") == norms
    assert names.count("_adamw_kernel") == names.count("_square_kernel") == 1
    wgrads = sum(k.launches for k in ops if k.phase == "wgrad")
    assert wgrads == 4 * shape.n_layer + 1
    # the accumulator's fp32, without a cast behind it
    (head,) = (k for k in ops if k.phase == "wgrad" and k.component == "head")
    N, C, V = shape.B * shape.T, shape.n_embd, shape.vocab_size
    assert head.bytes == 2 * (N * C + N * V) + 4 * C * V


def test_launchers_are_those_of_the_fused_path():
    qkv = torch.zeros(1, 16, 3 * 64)
    with use_backend("triton"):
        theirs = chosen.launchers(qkv, 4, 0.0)
    ours = step.launchers("cudnn")
    for name in ("norm", "add_norm", "norm_backward", "add_rows_", "cross_entropy_"):
        assert getattr(ours, name) is getattr(theirs, name), name


def test_gelu_launchers_compute_what_the_fused_path_does():
    x, w, dy = torch.randn(6, 8), torch.randn(32, 8), torch.randn(6, 8)
    ours = step.launchers("cudnn")
    h, y = ours.linear_gelu(x, w, None, False)
    for mine, theirs in zip((h, y), mlp.cublas.forward(x, w, None, False), strict=True):
        assert torch.equal(mine, theirs)
    asked = (dy, torch.randn(8, 32), h, False, True, True)
    for mine, theirs in zip(ours.gelu_dgrad(*asked), mlp.cublas.dgrad(*asked), strict=True):
        assert torch.equal(mine, theirs)


def test_inductors_record_is_of_the_same_model():
    record = inductor.recorded("124M", 16)
    shape = shape_of("124M", 16, 1024, "bfloat16")
    ops = [op for op in roofline.training_step(shape) if op.work.flops]
    for kind, attends in ((GEMM, False), (ATTENTION, True)):
        flops = sum(k.launches * k.flops for k in record["kernels"] if k.kind == kind)
        by_hand = [op for op in ops if (op.group == "attention") == attends]
        assert flops == sum(op.times * op.work.flops for op in by_hand)
    assert inductor.recorded("124M", 3) is None


def test_what_cannot_be_generated_is_the_record(monkeypatch, capsys):
    monkeypatch.setattr(no_gpu, "problem", lambda: "no compiler")
    with pytest.raises(ValueError, match="no compiler"):
        inductor.generated("124M", 16)
    record = inductor.recorded("124M", 16)
    monkeypatch.setattr(predict.torch, "__version__", record["torch"])
    assert predict._compiled("124M", 16, generate=True) == record and not capsys.readouterr().err
    monkeypatch.setattr(predict.torch, "__version__", "another")
    assert predict._compiled("124M", 16, generate=True) == record
    assert "not generated here: no compiler" in capsys.readouterr().err


GENERATED = """
import json
from dataclasses import asdict
from bench.prediction import inductor

made = inductor.generated("char", 2)
print(json.dumps(made | {"kernels": [asdict(kernel) for kernel in made["kernels"]]}))
"""
cannot = no_gpu.problem() or inductor._no_nanogpt()


@pytest.mark.skipif(cannot is not None, reason=str(cannot))
def test_inductors_kernels_are_generated_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", GENERATED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    assert made["torch"] == torch.__version__
    found = [Kernel(**row) for row in made["kernels"]]
    shape = shape_of("char", 2, 128, "bfloat16")
    for kind, attends in ((GEMM, False), (ATTENTION, True)):
        flops = sum(k.launches * k.flops for k in found if k.kind == kind)
        ops = [op for op in roofline.training_step(shape) if op.work.flops]
        by_hand = [op for op in ops if (op.group == "attention") == attends]
        assert flops == sum(op.times * op.work.flops for op in by_hand)
    assert sum(k.launches for k in found if k.kind == TRITON) > 20


TTIR = """
  tt.func public @_kernel(%x_ptr: !tt.ptr<bf16>, %y_ptr: !tt.ptr<f32>, %N: i32) attributes {} {
    %c0_i32 = arith.constant 0 : i32
    %c256_i32 = arith.constant 256 : i32
    %table = tt.load %y_ptr : !tt.ptr<f32>
    %a = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<256x!tt.ptr<bf16>>
    %p = tt.addptr %a, %cols : tensor<256x!tt.ptr<bf16>>, tensor<256xi32>
    %sum = scf.for %i = %c0_i32 to %N step %c256_i32 iter_args(%acc = %zero, %q = %p) -> (f32) {
      %x = tt.load %q, %mask, %other : tensor<256x!tt.ptr<bf16>>
      %r = "tt.reduce"(%x) <{axis = 0 : i32}> ({
      }) : (tensor<256xf32>) -> f32
      scf.yield %r : f32
    }
    %where = tt.addptr %y_ptr, %table : !tt.ptr<f32>, i32
    %last = tt.load %where : !tt.ptr<f32>
    tt.store %where, %sum : !tt.ptr<f32>
  }
"""


def test_loads_and_stores_are_read_from_the_ir():
    found = ir.read(TTIR)
    assert [(s.argument, s.bytes, s.loops, s.stores) for s in found.sites] == [
        (1, 4, (), False),
        (0, 512, (0,), False),
        (1, 4, (), False),
        (1, 4, (), True),
    ]
    assert found.chain == 2  # the last load's address was loaded


def test_loops_turn_as_often_as_their_bounds_say():
    found = ir.read(TTIR)
    assert ir.turns(found, [None, None, 1000], 7) == [4.0]  # blocks of 256
    # programs stride over 100 blocks
    strided = [
        ir.Step("%p", "tt.get_program_id", ()),
        ir.Step("%n", "tt.get_num_programs", ()),
        ir.Step("0", "loop", ("%p", "%N", "%n")),
    ]
    assert ir.turns(found._replace(steps=tuple(strided)), [None, None, 100], 64) == [100 / 64]
    # a chunk of a tensor whose place and size were loaded: neither is known, their distance is
    chunk = [
        ir.Step("%c", "arith.constant", ("4096",)),
        ir.Step("%block", "arith.constant", ("1024",)),
        ir.Step("%end", "arith.addi", ("%loaded", "%c")),
        ir.Step("%last", "arith.minsi", ("%end", "%size")),
        ir.Step("0", "loop", ("%loaded", "%last", "%block")),
    ]
    assert ir.turns(found._replace(steps=tuple(chunk)), [None, None, 1], 3) == [4.0]


def test_an_if_goes_the_way_that_moves_more():
    text = """
    scf.if %whole {
      tt.store %p, %x : tensor<8x!tt.ptr<f32>>
    } else {
      tt.store %p, %x : tensor<64x!tt.ptr<f32>>
      scf.if %more {
        tt.store %q, %x : !tt.ptr<f32>
      }
    }
    """
    assert [site.elements for site in ir.read(text).sites] == [64, 1]


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA 0x60 ;
        /*0020*/                   FADD R4, R4, R4 ;
        /*0030*/                   VIADD R9, R9, 0x800 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
"""


def test_instructions_are_those_on_the_way_that_moves_most():
    code = machine_code.Code(ir.read(TTIR), sass.instructions(SASS), frozenset(), 8, 0)
    once = [times for _, times in machine_code._way(code, [5.0], warps=1)]
    assert once == [1, 1, 5, 5, 5, 5, 1]
    # two warps move the 512 bytes of two trips in a turn
    unrolled = [times for _, times in machine_code._way(code, [6.0], warps=2)]
    assert unrolled == [1, 1, 3, 3, 3, 3, 1]


def test_a_loop_without_bytes_is_unrolled_as_far_as_its_counter_goes():
    body = list(sass.instructions(SASS)[2:6])
    assert machine_code._unrolled(body, 0, 1, frozenset({1024})) == 2
    assert machine_code._unrolled(body, 0, 1, frozenset({999})) == 1


def test_a_tensor_is_read_again_in_whole_passes():
    """A row in blocks and what lies beyond them, twice, and one of its elements."""
    blocks, rest = ir.Site(0, 512, 256, (0,), False), ir.Site(0, 128, 64, (), False)
    looked_up = ir.Site(0, 2, 1, (), False)
    sites = (looked_up, blocks, rest, blocks, rest, blocks._replace(stores=True))
    found = ir.read(TTIR)._replace(sites=sites)
    code = machine_code.Code(found, sass.instructions(SASS), frozenset(), 8, 0)
    row = 2 * 1044  # bytes: four blocks, 20 elements, and 44 masked lanes
    made = machine_code.counted("k", "loss", code, 3, 1, [None, None, 1024], [3 * row, 0, 0])
    assert made.again == 3 * row
    assert made.bytes == 2 * 3 * row + 3 * 2048
    once = code._replace(ir=found._replace(sites=(blocks, rest)))
    made = machine_code.counted("k", "loss", once, 3, 1, [None, None, 1024], [3 * row, 0, 0])
    assert (made.again, made.bytes) == (0, 3 * row)


PASS = Kernel(
    *("pass", "norm", TRITON, 1, 1e9),
    **dict(elements=1e8, instructions=1e6, grid=10**5, warps=4, registers=32),
)


def test_the_model():
    """The slower of memory and issue, and more where few warps share a multiprocessor."""
    at_memory = 1e6 * PASS.bytes / (model.BANDWIDTH * H200.bandwidth)
    assert model.microseconds(PASS, H200) == pytest.approx(at_memory, rel=0.02)
    busy = replace(PASS, instructions=1e9)
    assert model.microseconds(busy, H200) > 3 * at_memory
    large = replace(PASS, registers=255)
    assert model.programs_per_processor(PASS, H200) == 16
    assert model.programs_per_processor(large, H200) == 2
    assert model.microseconds(large, H200) > model.microseconds(PASS, H200)
    assert model.microseconds(PASS, GPUS["A100"]) > 2 * at_memory


def test_a_step_takes_what_it_draws():
    """Products draw more than the GPU may, passes less: the more of these, the less it shows."""
    product = Kernel("mm", "mlp", GEMM, 10, 1e6, flops=1e12, phase="forward")
    passes = replace(PASS, launches=3)
    alone = model.step_ms([product], H200)
    assert alone == pytest.approx(model.DRAW["products"] * model.kernels_ms([product], H200))
    both = model.step_ms([product, passes], H200)
    assert alone < both < alone + model.kernels_ms([passes], H200)
    many = [product, replace(PASS, launches=3000)]
    gaps = 1e-3 * model.GAP * model.launches(many)
    assert model.step_ms(many, H200) == pytest.approx(model.kernels_ms(many, H200) + gaps)


def test_a_second_reading_counts_where_l2_cannot_hold_it():
    programs = 16 * H200.processors
    fits = replace(PASS, again=5e8, grid=10**5)
    assert model.live_bytes(fits, H200) == pytest.approx(5e8 / 1e5 * programs)
    assert model.moved(fits, H200) == 5e8
    large = replace(fits, again=5e8, grid=10**4)
    assert model.live_bytes(large, H200) > H200.l2
    assert model.moved(large, H200) == 1e9


def test_a_gpu_is_known_by_its_peak():
    assert all(gpu.flops() > 1e14 for gpu in GPUS.values())
