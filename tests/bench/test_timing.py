"""fastgpt.commands.timing on CUDA, without one: the order of what it would ask of the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.commands import timing

CPU = torch.device("cpu")


class Device(TorchDispatchMode):
    """Stands in for torch.cuda: `log` is what was queued on it, in order.

    The host has queued a call in time if at least `slow` operations lie in front of its start.
    """

    def __init__(self, slow: int = 1):
        super().__init__()
        self.log: list[str] = []
        self.slow = slow

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.log.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)

    def synchronize(self, device):
        self.log.append("synchronize")

    def in_front(self) -> list[str]:
        """What was queued since the last synchronisation, up to the event of a call's start."""
        last = len(self.log) - self.log[::-1].index("event", self.log[::-1].index("call"))
        queued = self.log[: last - 1]
        while "synchronize" in queued:
            queued = queued[queued.index("synchronize") + 1 :]
        return queued


class Event:
    def __init__(self, device: Device):
        self.device = device

    def record(self):
        self.device.log.append("event")

    def query(self) -> bool:
        return len(self.device.in_front()) < self.device.slow

    def elapsed_time(self, stop) -> float:
        return 5.0  # milliseconds


@pytest.fixture
def timer(monkeypatch):
    def make(slow: int = 1):
        device = Device(slow)
        monkeypatch.setattr(torch.cuda, "Event", device.Event)
        monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
        call = lambda: device.log.append("call")  # noqa: E731
        return device, timing._CudaTimer(call, CPU, torch.ones(4))

    return make


def test_the_cache_is_read_and_nothing_is_written_or_slept_in_front_of_a_call(timer, monkeypatch):
    def slept(cycles):
        raise AssertionError("the device was left idle")

    monkeypatch.setattr(torch.cuda, "_sleep", slept)
    device, timed = timer()
    with device:
        assert [timed.sample(), timed.sample()] == [5e-3, 5e-3]
    assert device.log == 2 * ["sum", "event", "call", "event", "synchronize"]


def test_reads_are_added_until_the_host_is_in_time_and_kept_from_then_on(timer):
    device, timed = timer(slow=3)
    with device:
        timed.sample()
        assert timed.reads == 4
        before = len(device.log)
        timed.sample()
    assert device.log[before:] == [*4 * ["sum"], "event", "call", "event", "synchronize"]


def test_a_call_that_waits_for_the_device_itself_gets_a_time(timer):
    device, timed = timer(slow=10**9)
    with device:
        assert timed.sample() == 5e-3
        before = device.log.count("call")
        assert timed.sample() == 5e-3
    assert timed.reads == timing.MAX_READS and device.log.count("call") == before + 1


def test_on_a_cpu_every_variant_has_a_sample_of_every_round():
    calls = {name: (lambda: sum(range(100))) for name in "ab"}
    samples = timing.in_turns(calls, CPU, 0.01)
    assert len(samples["a"]) == len(samples["b"]) >= 3
