"""Measurements, a command each (README.md)."""

import os

# PyTorch's profiler announces itself on stderr otherwise, a line of "USDT:..." each time
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
