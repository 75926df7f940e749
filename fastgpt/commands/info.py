"""`fastgpt info`: device, versions, and what each op would run here, with the reason."""

import argparse

from fastgpt.environment import backend_report, versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: `fastgpt info` takes no arguments."""


def main(args: argparse.Namespace) -> int:
    for name, version in versions().items():
        print(f"{name:<14}{version}")
    print()
    for op, choice in backend_report().items():
        print(f"{op:<26}{choice.implementation:<12}{choice.reason}")
    return 0
