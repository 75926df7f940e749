"""`fastgpt info`: a bug report's first page. What is here, and what each op would run on it, why.

Nothing here is looked up elsewhere: `--json` prints the same for a program to read.
"""

import argparse
import json
import textwrap
from typing import Any

import fastgpt
from fastgpt import environment

WIDTH, NAME = 60, 14  # columns of a line, and of what a line is about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print an object, not a page")


def report() -> dict[str, Any]:
    ops = {op: choice._asdict() for op, choice in environment.backend_report().items()}
    return {
        "fastgpt": fastgpt.__version__,
        **environment.versions(),
        **environment.hardware(),
        "C compiler": environment.c_compiler(),
        "caches": environment.caches(),
        "ops": ops,
    }


def page(facts: dict[str, Any]) -> str:
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, str):
            lines += _wrapped(f"{name:<{NAME}}{value}", NAME)
    lines += ["", "caches"]
    for name, value in facts["caches"].items():
        lines += _wrapped(f"  {name:<{NAME - 2}}{value}", NAME)
    lines += ["", "what each op runs here, at GPT-2's shapes, and why"]
    for op, choice in facts["ops"].items():
        lines += [f"{op:<26}{choice['implementation']}", *_wrapped(f"    {choice['reason']}", 4)]
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def main(args: argparse.Namespace) -> int:
    facts = report()
    print(json.dumps(facts, indent=1) if args.json else page(facts))
    return 0
