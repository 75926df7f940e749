"""The workflow tests what the metadata promise."""

import re

import pytest

from tests import versions
from tests.docs.pages import ROOT

SETUP = (ROOT / "setup.py").read_text()


@pytest.fixture
def jobs():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the workflow")
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def test_every_python_that_is_promised(jobs):
    (minors,) = re.findall(r"for minor in \((.*?)\)\)", SETUP)
    promised = [f"3.{minor.strip()}" for minor in minors.split(",")]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    assert f'python_requires=">={promised[0]}"' in SETUP


def test_both_ends_of_torch(jobs):
    oldest, newest = jobs["test"]["strategy"]["matrix"]["packages"]
    assert oldest.split() == versions.PAIRS["oldest"].packages
    assert newest.split() == versions.PAIRS["newest"].packages
    (least,) = re.findall(r'"torch>=([\d.]+)"', SETUP)
    assert f"torch=={least}.0" in oldest.split()


def test_it_runs_what_a_change_must_pass(jobs):
    steps = [step.get("run", "") for step in jobs["test"]["steps"]]
    assert any(step.endswith(".ci/run PYTHON=python") for step in steps)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert jobs["deep"]["steps"][-1]["run"] == "make test-deep"


def test_metadata():
    for words in ('author="fastgpt contributors"', 'license="MIT"', "project_urls=", "py.typed"):
        assert words in SETUP
    for label in re.findall(r'"([^"]+)": "https?://', SETUP):
        assert "," not in label  # where metadata end a label
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert (ROOT / "fastgpt/py.typed").exists()


def test_what_test_fast_names_is_there():
    (listed,) = re.findall(r"^FAST = (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.M | re.S)
    paths = listed.replace("\\", " ").split()
    assert len(paths) > 5 and all((ROOT / path).is_file() for path in paths)
