"""pytest -p tests.gpu.shard --shard I/N: every N-th of the collected tests, from the I-th on.

Imports nothing of torch or triton: conftest.py must be the first to.
"""


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="I/N")


def pytest_collection_modifyitems(config, items):
    first, step = map(int, config.getoption("shard").split("/"))
    kept = items[first::step]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
