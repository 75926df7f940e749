"""Options for `pytest bench/pytest_ops.py`."""

from bench import ops


def pytest_addoption(parser):
    ops.add_sizes(parser.addoption)
    parser.addoption("--rounds", type=int, default=20, help="calls that are timed of each variant")
