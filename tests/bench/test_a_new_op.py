"""An op is added with a definition, a public function, a kernel, an entry and an example: all that
lists ops then shows it, and its test is one line through tests/close.py.
"""

import sys
import types

import pytest
import torch
from torch import Tensor

import fastgpt
from bench.harness import op_cases
from fastgpt import backend, cli, examples, ops, reference, use_backend
from fastgpt.commands import implementation_race, launch_search
from tests.close import DEVICE, assert_as_accurate, randn
from tests.gpu.cases import SMALL, cases

SIZES = examples.Sizes(2, 8, 32, 2, 11)


def halve(x: Tensor) -> Tensor:
    """The public function, as ops.py has them."""
    return backend.choose("halve", x).halve(x)


def _halve_example(sizes: examples.Sizes, draw: examples.Draw) -> examples.Example:
    return examples.Example((draw(sizes.B * sizes.T, sizes.C),), {}, {})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    kernel = types.ModuleType("fastgpt.kernels.toy")
    kernel.halve = lambda x: x * 0.5
    kernel.unsupported = lambda tensors: None
    monkeypatch.setitem(sys.modules, "fastgpt.kernels.toy", kernel)
    monkeypatch.setattr(fastgpt.kernels, "toy", kernel, raising=False)
    monkeypatch.setattr(reference, "halve", lambda x: x / 2, raising=False)
    monkeypatch.setattr(ops, "halve", halve, raising=False)
    entry = backend.Op({"triton": "fastgpt.kernels.toy"}, "triton")
    monkeypatch.setitem(backend.OPS, "halve", entry)
    monkeypatch.setitem(examples.EXAMPLES, "halve", _halve_example)


def test_it_is_as_accurate_as_its_definition():
    assert_as_accurate(ops.halve, reference.halve, randn(5, 7), grads=[randn(5, 7)])


def test_dispatch_knows_it():
    assert fastgpt.backend_report()["halve"].implementation == "torch"  # "auto" on a CPU
    with use_backend("triton"):
        assert fastgpt.backend_report()["halve"].implementation == "triton"
    with pytest.raises(ValueError, match="unknown implementation 'cublas' of halve"):
        use_backend("auto", halve="cublas")


def test_info_lists_it(capsys):
    assert cli.main(["info"]) == 0
    assert "\nhalve " in capsys.readouterr().out


def test_tune_races_it(monkeypatch):
    sizes = launch_search.Sizes(16, 32, 16, 11, torch.float32)
    kept = {op: backend.OPS[op] for op in ("halve", *implementation_race.WHOLE)}
    monkeypatch.setattr(backend, "OPS", kept)
    rows = implementation_race.race(torch.device(DEVICE), sizes, 0.1)
    assert {row["op"] for row in rows} == {"halve", *implementation_race.WHOLE}


def test_the_benchmarks_time_it():
    listed = op_cases.cases(torch.device(DEVICE), torch.float32, 16, 64, 97)
    assert "halve" in {case.op for case in listed}


def test_the_gpu_suite_compares_it():
    case = cases()["halve, triton"](SMALL, torch.float32)
    assert torch.equal(case.run()[0], case.inputs[0] / 2)
