"""Who notices that a process is gone: a thread in each, which beats and looks at its neighbour.

Every process sets a key of its own in the rendezvous's store twice a second, and reads that of the
process before it. One that has stood still for `PATIENCE` seconds is lost, which is written where
all look. So the loss is noticed wherever the others wait, in NCCL too, and on other machines.
"""

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = 10.0  # seconds without a beat; a busy machine may hold one up for a few
SUSPICIOUS = 3.0  # the same once a collective has failed
_PAUSE = 0.5


class LostProcess(RuntimeError):
    """Another process of the job is gone; the message names it."""


class Watch:
    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.before = (rank - 1) % size
        self.patience = PATIENCE
        self.lost: str | None = None
        self.busy = threading.Lock()  # held while something is written that must be whole
        self._over = threading.Event()
        self._reason_known = threading.Event()
        # a connection of its own: one that waits for a key holds up whoever else uses it
        self._store: Any = own_part(connect())
        self._set(f"who/{rank}", f"process {rank} (pid {os.getpid()} on {socket.gethostname()})")
        self._set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """To be called when every process has made its Watch."""
        self._who = self._get(f"who/{self.before}")
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def tell(self, message: str) -> None:
        """The others that this process ends, and why."""
        if not self._over.is_set():
            self._set("lost", f"process {self.rank} ended: {message}"[:500])
            self._over.set()

    def reason(self) -> str | None:
        """After a collective has failed: who is lost, as soon as that is known; None if nobody."""
        self.patience = SUSPICIOUS
        self._reason_known.wait(PATIENCE + 2)
        return self.lost

    def _run(self) -> None:
        beats, last, seen = 0, "", time.monotonic()
        while not self._over.wait(_PAUSE):
            beats += 1
            try:
                self._set(f"beat/{self.rank}", str(beats))
                if self._store.check(["lost"]):
                    return self._end(self._get("lost"), mine=False)
                now, beat = time.monotonic(), self._get(f"beat/{self.before}")
            except Exception:  # of the store, which is the first process's, or its launcher's
                lost = "the rendezvous cannot be reached: process 0 or its machine is lost"
                return self._end(lost, mine=True)
            if beat != last:
                last, seen = beat, now
            elif now - seen > self.patience:
                lost = f"{self._who} is lost: no sign of life for {now - seen:.0f} s"
                self._set("lost", lost)
                return self._end(lost, mine=True)

    def _end(self, lost: str, mine: bool) -> None:
        """Give the main thread, whose collectives may have failed already, a while to end."""
        self.lost = lost
        self._reason_known.set()
        if self._over.wait(4):
            return
        with self.busy:
            if mine:  # one process says it
                print(f"\nfastgpt: {lost}; the job ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _set(self, name: str, value: str) -> None:
        self._store.set(name, value)

    def _get(self, name: str) -> str:
        return self._store.get(name).decode()


def connect(host_if_first: int = -1) -> Any:
    """To the store where processes meet: torchrun's, or one that process 0 opens for all."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"{name} is not in the environment; start the processes with torchrun")
    opens = host_if_first == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or int(port) >= 2**16:
        raise ValueError(f"MASTER_PORT={port!r} in the environment is no port; start with torchrun")
    patience = timedelta(minutes=5)
    return dist.TCPStore(host, int(port), is_master=opens, timeout=patience, wait_for_workers=False)


def own_part(store: Any) -> Any:
    """Of a store that outlives this start of the processes: PyTorch's own default has been seen to
    find addresses of the start before there."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return dist.PrefixStore("/".join(["fastgpt", *(os.environ.get(n, "") for n in names)]), store)
