"""Every command in every page is run, and what a page points at is there.

Shell blocks run as they stand, page by page, with smaller sizes behind the commands (shims.py);
Python blocks of a page run one below another, as a reader would paste them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import cli
from fastgpt.commands import train
from fastgpt.commands.options import Parser
from fastgpt.commands.prepare import prepare
from fastgpt.training import sharded
from tests.docs import pages, shims
from tests.docs.pages import ALSO, PAGES, ROOT, Block
from tests.marks import slow

EVERY = [*PAGES, *ALSO]
NAMES = {page: page.relative_to(ROOT).as_posix() for page in EVERY}


def in_nanogpt(block: Block) -> bool:
    return block.text.startswith("cd nanoGPT\n")


def shell_blocks(page: Path, nanogpt: bool) -> list[str]:
    found = [block for block in pages.blocks(page) if block.language == "sh"]
    return [block.text for block in found if in_nanogpt(block) == nanogpt]


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> dict[str, str]:
    make = shutil.which("make")
    if shutil.which("bash") is None or make is None:
        pytest.skip("the blocks are for bash, and for make")
    folder = tmp_path_factory.mktemp("shims")
    shims.write(folder)
    return shims.environment(folder, make)


OUTSIDE, INSIDE = ([p for p in PAGES if shell_blocks(p, inside)] for inside in (False, True))


def readme_first(found: list[Path]) -> list:
    """Parameters; the commands of other pages are left to CI."""
    return [p if p.name == "README.md" else slow(p) for p in found]


def run(block: str, folder: Path, tools: dict[str, str]) -> None:
    done = subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", block], cwd=folder, env=tools,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.parametrize("page", readme_first(OUTSIDE), ids=NAMES.get)
def test_shell_blocks(page, tools, tmp_path):
    found = shell_blocks(page, nanogpt=False)
    for word, package in (("convert", "transformers"), ("inspect", "triton")):
        if word in "".join(found):
            pytest.importorskip(package, reason=f"fastgpt {word} needs {package}")
    (tmp_path / "docs").mkdir()  # a page that a command writes into
    shutil.copy(ROOT / "docs/initialisation.md", tmp_path / "docs")
    for block in found:
        if "--shard" in block and (reason := sharded.problem("cpu")):
            pytest.skip(reason)
        run(block, tmp_path, tools)


@pytest.mark.parametrize("page", INSIDE, ids=NAMES.get)
def test_shell_blocks_in_nanogpts_folder(page, tools, tmp_path):
    if not (theirs := os.environ.get("NANOGPT_DIR")):
        pytest.skip("NANOGPT_DIR names no nanoGPT checkout")
    pytest.importorskip("numpy", reason="nanoGPT's train.py imports numpy")
    ignored = shutil.ignore_patterns(".git", "*.ipynb", "assets")
    folder = Path(shutil.copytree(theirs, tmp_path / "nanoGPT", ignore=ignored))
    prepare("To be, or not to be: that is the question.\n" * 50, folder / "data/shakespeare_char")
    for block in shell_blocks(page, nanogpt=True):
        run(block, tmp_path, tools)


def test_what_takes_several_machines_or_gpus_parses(tools):
    """Blocks of bash are shown and not run: what bash, and our commands, can read of them.

    nanoGPT's train.py asks for CUDA as soon as it is one of several processes.
    """
    blocks = [b.text for page in PAGES for b in pages.blocks(page) if b.language == "bash"]
    assert len(blocks) == 3  # of scaling.md
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block], check=True, env=tools)
        for options in re.findall(r"-m fastgpt train (.*)", block):
            parser = Parser()
            train.add_arguments(parser)
            parser.parse_args(options.split())


@pytest.mark.slow
@pytest.mark.parametrize("source", [".", "git+$REPOSITORY"])
def test_what_pip_is_told_to_install(source, tools, tmp_path):
    """From the same source, without its dependencies and without a network."""
    lines = [line for page in PAGES for line in pages.of(page, "sh").splitlines()]
    assert any(line.replace('"', "").startswith(f"pip install {source} ") for line in lines)
    needs = [sys.executable, "-c", "import setuptools.command.bdist_wheel, pip"]
    if subprocess.run(needs, capture_output=True).returncode != 0:
        pytest.skip("building a wheel offline takes pip and setuptools >= 70.1")
    if source != "." and not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a git checkout, or no git to clone it with")
    named = str(ROOT) if source == "." else f"git+file://{ROOT}"
    command = [sys.executable, "-m", "pip", "install", named, "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--no-index", "--target", str(tmp_path / "site")],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    env = {**tools, "PYTHONPATH": str(tmp_path / "site")}
    asked = [sys.executable, "-m", "fastgpt", "--version"]
    said = subprocess.run(asked, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert said == f"fastgpt {fastgpt.__version__}\n"


@pytest.mark.parametrize(
    "page", readme_first([p for p in PAGES if pages.of(p, "python")]), ids=NAMES.get
)
def test_python_blocks(page, tmp_path):
    code = pages.of(page, "python")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-"], input=code, cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_no_command_hides_in_a_block_that_is_not_run(page):
    for block in pages.blocks(page):
        if block.language not in ("sh", "bash", "python"):
            first = [line.split()[0] for line in block.text.splitlines() if line.split()]
            assert not set(first) & set(pages.PROGRAMS), block.text


@pytest.mark.parametrize("page", EVERY, ids=NAMES.get)
def test_commands_in_sentences_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, *words in pages.inline(page):
        if program == "make":
            assert words[0] in targets, words
        elif program == "fastgpt":
            assert words[0] in {*cli.MODULES, "bench", "COMMAND"} or words[0].startswith("-"), words
        elif program == "python" and words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words


@pytest.mark.parametrize("page", EVERY, ids=NAMES.get)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        assert (page.parent / link).exists(), link


def test_the_index_names_every_page_and_example():
    index = set(pages.links(ROOT / "docs/README.md"))
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*")}
    wanted = {name for name in here if name.endswith((".md", ".py"))} - {"README.md"}
    assert wanted <= index


def test_the_front_door_names_all_that_it_promises():
    """One picture, before anything else; three journeys; what a reader looks for."""
    text = (ROOT / "README.md").read_text()
    assert text.index("![") < text.index("## Install") < text.index("## Three ways in")
    assert text.count("![") == 1
    for promise in ("## What is proven", "## Limitations", "## Questions", "T4", "Mac", "bf16?"):
        assert promise in text
    assert "fastgpt run train.py" in pages.of(ROOT / "README.md", "sh")


def test_the_list_of_targets_is_complete(tools):
    listed = subprocess.run(
        [tools["REAL_MAKE"], "--no-print-directory", "help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert {line.split()[1] for line in listed.stdout.splitlines()} == set(phony[1].split())
