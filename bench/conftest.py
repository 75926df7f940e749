"""bench.ops's options, for `pytest bench/pytest_ops.py`."""

from bench import ops


def pytest_addoption(parser):
    ops.add_options(parser.addoption)
