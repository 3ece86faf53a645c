# SPDX-License-Identifier: Apache-2.0
"""Processes that step simulators on the host; `host_episodes.rollout` plays episodes in them.

A process is a new interpreter, not a fork, and does not load JAX. One that ends, or says nothing for `timeout` seconds,
is killed with all that it has started and replaced; what it held is `Failed`. None outlives the pool, nor its process.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from multiprocessing import Pipe, connection

from opd_jax.sampling.host_simulator import MakeFn
from opd_jax.sampling.host_worker import Act, Begin, Failed, Turn

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS")  # 1, unless set; the last is Mesa's
STARTUP = 300.0  # seconds that a process may take to import the simulator
Messages = dict[int, Begin | Act]
Replies = dict[int, Turn | Failed]


class SimulatorError(RuntimeError):
    """A simulator that cannot be made, or an episode that failed more often than is allowed."""


class Pool:
    """Processes with simulators, started when first needed; `close`, or `with`, ends them.

    Args:
        make: `make(task) -> Simulator`, of an importable module, for it is pickled.
        workers: processes; `batch` at most are started.
        batch: simulators at once, and rows of the policy; their memory is the limit.
        timeout: seconds for one decision of one simulator, or for making and resetting it.
        retries: failures of an episode that are forgiven.
        spare: idle simulators that each process keeps for tasks to come, where making one takes long.

    Raises:
        ValueError: numbers that cannot be; something that cannot be pickled.
    """

    def __init__(
        self,
        make: MakeFn,
        *,
        workers: int = 2,
        batch: int = 8,
        timeout: float | int = 120.0,
        retries: int = 2,
        spare: int = 0,
    ):
        if min(workers, batch) < 1 or timeout <= 0 or min(retries, spare) < 0:
            numbers = f"workers={workers}, batch={batch}, timeout={timeout}, retries={retries}, spare={spare}"
            raise ValueError(f"{numbers}: give at least 1 worker, a batch of 1, a positive timeout, the rest from 0 on")
        try:
            self._make = pickle.dumps((make, spare))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"make={make!r} cannot be pickled: give a function of an importable module") from error
        self.batch, self.retries, self._timeout = batch, retries, timeout
        self._workers: list[_Worker | None] = [None] * min(workers, batch)
        weakref.finalize(self, _end_all, self._workers)  # also when the interpreter ends

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; the next use starts new ones."""
        _end_all(self._workers)

    def exchange(self, messages: Messages) -> Replies:
        """Sends the messages of slots, 0 to batch - 1, to their processes, and waits for all replies.

        Returns:
            A reply for each message. Where a process was lost, `Failed` for all of its slots whose episode was not
            over, with a reason for the first that had not answered: that one is to blame.

        Raises:
            SimulatorError: `make` cannot be loaded in another process.
        """
        replies: Replies = {}
        busy = self._send(messages)
        while busy:
            wait = min(self._workers[index].deadline(self._timeout) for index in busy.values()) - time.monotonic()
            ready = connection.wait(list(busy), max(wait, 0))
            for one in ready or [one for one, index in busy.items() if self._late(index)]:
                worker = self._workers[busy[one]]
                lost = worker.receive() if ready else f"gave no reply for {worker.patience(self._timeout):g} s"
                if lost:
                    self._workers[busy[one]] = None
                    replies |= worker.lose(lost)
                elif not worker.pending:
                    replies |= worker.replies
                if lost or not worker.pending:
                    del busy[one]
        return replies

    def _send(self, messages: Messages) -> dict[connection.Connection, int]:
        """Every process's share at once, by slot; the processes that are to answer."""
        busy = {}
        for index in range(len(self._workers)):
            share = {slot: message for slot, message in messages.items() if slot % len(self._workers) == index}
            if share:
                worker = self._workers[index] = self._workers[index] or _Worker(self._make)
                worker.send(share)
                busy[worker.connection] = index
        return busy

    def _late(self, index: int) -> bool:
        return self._workers[index].deadline(self._timeout) <= time.monotonic()


class _Worker:
    """One process, what it was asked and what it has not yet answered."""

    def __init__(self, make: bytes):
        self.connection, theirs = Pipe()
        command = f"from opd_jax.sampling import host_worker; host_worker.main({theirs.fileno()}, {os.getpid()})"
        threads = {name: os.environ.get(name, "1") for name in THREADS}
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,  # what a simulator starts ends with it, and Ctrl-C does not reach it
        )
        theirs.close()
        self.pending: list[int] = []
        self.replies: Replies = {}
        self._started = False
        with contextlib.suppress(OSError):  # why it has ended is found by `receive`
            self.connection.send_bytes(make)

    def patience(self, timeout: float | int) -> float | int:
        """Seconds that it may be silent for: more, while it starts."""
        return timeout if self._started else STARTUP

    def deadline(self, timeout: float | int) -> float:
        return self._heard + self.patience(timeout)

    def send(self, messages: Messages) -> None:
        self.pending, self.replies, self._heard = list(messages), {}, time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(list(messages.items()))

    def receive(self) -> str | None:
        """Takes one reply; if there is none any more, says so."""
        try:
            slot, reply = self.connection.recv()
        except (EOFError, OSError):
            return "has ended"
        self._started, self._heard = True, time.monotonic()
        if slot is not None:
            self.pending.remove(slot)
            self.replies[slot] = reply
        elif reply is not None:
            remedy = "its function must be of a module that another process can import"
            raise SimulatorError(f"the simulator's maker cannot be loaded, {remedy}:\n{reply.reason}")
        return None

    def lose(self, reason: str) -> Replies:
        """Ends it. Replies stand where an episode was over or had failed; the first that is pending is to blame."""
        first, *others = self.pending
        last = lambda reply: isinstance(reply, Failed) or reply.observation is None
        stand = {slot: reply for slot, reply in self.replies.items() if last(reply)}
        innocent = dict.fromkeys([*others, *self.replies], Failed(""))
        return innocent | stand | {first: Failed(f"its process {reason}{self.end()}")}

    def end(self) -> str:
        """Kills it and all that it has started; says how it had ended by itself, if so."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # a closed connection comes a little before the end
            self._process.wait(0.5 if self.connection.closed or self.connection.poll() else 0)
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        if code is None:
            return ""
        return f", by {signal.Signals(-code).name}" if code < 0 else f", exit code {code}"


def _end_all(workers: list[_Worker | None]) -> None:
    for index, worker in enumerate(workers):
        workers[index] = None
        if worker:
            worker.end()
