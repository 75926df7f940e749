"""What several test files mark alike."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that `make test` leaves to `make test-slow`, where another one shows most of it."""
    return pytest.param(*values, marks=pytest.mark.slow)
