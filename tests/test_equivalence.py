"""The report on equivalence, and that every mutant still breaks the kernel it was written for."""

import ast
import math
from collections import Counter

import pytest
import torch

from fastgpt import reference
from tests import calls, equivalence, mutants
from tests.close import compare, randn


@pytest.fixture(scope="module")
def rows():
    return equivalence.measure("add_layer_norm", torch.float32, [0])


def test_the_report_names_every_output_and_gradient(rows):
    gradients = [f"gradient of {name}" for name in ("delta", "residual", "weight", "bias")]
    assert [row.what for row in rows] == ["output 1", "output 2", *gradients]
    text = equivalence.report(rows, 1, None)
    for row in rows:
        (error,), (eager,) = row.errors, row.eager_errors
        figures = f"| {row.what} | float32 | {error:.2f} | {eager:.2f} |"
        assert figures in text and row.worst.words in text
    assert "No mutants were tried" in text


def test_a_reported_input_is_found_again(rows, capsys):
    row = rows[-1]
    assert equivalence.main(["--case", row.op, row.dtype, str(row.worst.seed)]) == 0
    printed = capsys.readouterr().out
    assert f"| {row.what} | float32 | {row.worst.seed} | {row.worst.found.error:.1e} |" in printed
    assert row.worst.words in printed


def test_a_wrong_op_shows(monkeypatch, tmp_path):
    def rounded(x, weight, bias=None):
        return reference.layer_norm(x.half().to(x.dtype), weight, bias)

    wrong = calls.OPS["layer_norm"]._replace(ours=rounded)
    monkeypatch.setattr(equivalence, "OPS", {"layer_norm": wrong})
    out = tmp_path / "equivalence.md"
    assert equivalence.main(["--examples", "1", "--out", str(out)]) == 1
    assert "| layer_norm | output | float32 | " in out.read_text()


@pytest.mark.parametrize(
    "a, b, expected", [(0, 0, 0), (1, 2, 0.5), (1, 0, math.inf), (math.nan, 1, math.inf)]
)
def test_ratio(a, b, expected):
    assert equivalence.ratio(a, b) == expected


def test_what_is_larger_on_most_inputs_is_no_chance(rows):
    def row(larger, smaller):
        result = rows[0].results[0]
        errors = [2.0] * larger + [0.5] * smaller
        each = [result._replace(found=result.found._replace(error=e, eager_error=1.0))
                for e in errors]  # fmt: skip
        return rows[0]._replace(results=each)

    assert (row(14, 11).larger, row(14, 11).why[:6]) == (14, "chance")
    assert row(2, 23).why.startswith("chance")
    assert row(23, 2).why == "not known"
    text = equivalence.in_short([row(14, 11)], [])
    assert "| 2.00 | 14 of 25 | chance" in text


def test_a_nan_is_the_largest_error():
    x = randn(4, 8)
    found = compare(lambda x: x * math.nan, lambda x: x, x, grads=[x])
    results = [equivalence.Result(0, "", each) for each in found]
    assert all(r.of_allowed == math.inf for r in results)


def test_every_mutant_breaks_its_kernel_and_no_two_alike():
    everything = list(mutants.mutants())
    broken = []
    for mutant in everything:
        source = mutant.path(mutants.ROOT).read_text()
        broken.append(mutant.within(source))
        if mutant.file.endswith(".py"):
            ast.parse(broken[-1])
        assert broken[-1] != source
    assert len(set(broken)) == len(broken)
    counts = Counter(mutant.test for mutant in everything)
    assert all(counts[of] >= 20 for of in ("attention", "cross_entropy", "mlp", "layer_norm"))


@pytest.fixture
def tree(tmp_path):
    """A project of one kernel and its test."""
    for folder in ("kernels", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels/double.py").write_text("def double(x):\n    return x * 2\n")
    test = "from kernels.double import double\n\ndef test_double():\n    assert double(2) == 4\n"
    (tmp_path / "tests/test_double.py").write_text(test)
    return tmp_path


@pytest.mark.parametrize("new, caught_by", [("x * 3", "test_double"), ("x + 2", "")])
def test_a_mutant_is_caught_or_survives(new, caught_by, tree):
    mutant = mutants.Mutant("double.py", "double", "wrong", "x * 2", new, "double")
    verdict = mutants.judge(mutant, tree)
    assert verdict.caught_by == caught_by
    assert verdict.how == ("assert 6 == 4" if caught_by else "")
    assert (tree / "kernels/double.py").read_text().endswith("x * 2\n")


def test_a_mutant_of_c():
    mutant = mutants.Mutant("double.c", "DOUBLE", "wrong", "x * 2", "x * 3", "double")
    assert mutant.within("#define DOUBLE(x) (x * 2)\n") == "#define DOUBLE(x) (x * 3)\n"
    with pytest.raises(ValueError, match="DOUBLE of"):
        mutant.within("#define TWICE(x) (x * 2)\n")


def test_a_mutant_whose_text_is_gone_is_an_error():
    mutant = mutants.Mutant("double.py", "double", "wrong", "x * 4", "x", "double")
    with pytest.raises(ValueError, match=r"double of double\.py no longer contains"):
        mutant.within("def double(x):\n    return x * 2\n")
