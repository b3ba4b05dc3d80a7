"""Symbolic comparison of two answers in processes that can be killed.

math-verify hands model output to SymPy, where a short answer can ask for more time and memory than there is. So it
runs in worker processes: past its deadline a worker is killed and replaced, past its memory limit it fails with an
error, and neither stops anyone else. Nothing of an answer is executed. They are plain child processes, as those of
multiprocessing would import the caller's main module again: here that is a Ray worker, a notebook or a test.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import selectors
import subprocess
import sys
import time
from functools import lru_cache

DEADLINE = 3.0  # seconds per answer
MEMORY = 2**30  # bytes that a worker may grow by
START = 60.0  # seconds until a new worker must be ready; it imports SymPy


class _Worker:
    def __init__(self, memory: int):
        command = [sys.executable, "-m", "parallel_r1.rewards.math_worker", str(memory)]
        # its messages about strange answers are of no use to anyone
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.ready = False

    def ask(self, question: list[str], deadline: float) -> str:
        """Its answer, "timeout" or "error"; after either it is of no use any more."""
        try:
            if not self.ready:
                if self._read(START) != "ready":
                    return "error"
                self.ready = True
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
            return self._read(deadline)
        except OSError:
            return "error"

    def _read(self, seconds: float) -> str:
        """One line of JSON; a worker writes no more than that at a time."""
        until, line, source = time.monotonic() + seconds, b"", self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    return "timeout"
                part = os.read(source, 4096)
                if not part:
                    return "error"
                line += part
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Comparer:
    """``workers`` processes that compare answers; safe to use from several threads."""

    def __init__(self, workers: int | None = None, deadline: float = DEADLINE, memory: int = MEMORY):
        self.deadline, self.memory = deadline, memory
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers or min(8, len(os.sched_getaffinity(0)))):
            self._idle.put(_Worker(memory))

    def compare(self, answer: str, gold: str) -> str:
        """ "ok", "wrong", "unparseable" (the answer is no mathematics), "timeout" or "error"."""
        worker = self._idle.get()
        status = "error"
        try:
            status = worker.ask([answer, gold], self.deadline)
            return status
        finally:
            if status == "timeout" or worker.process.poll() is not None or not worker.ready:
                worker.kill()
                worker = _Worker(self.memory)
            self._idle.put(worker)

    def close(self) -> None:
        """Kill the idle workers."""
        while not self._idle.empty():
            self._idle.get().kill()


@lru_cache(maxsize=1)
def shared() -> Comparer:
    """The pool of this process, made on first use."""
    comparer = Comparer()
    atexit.register(comparer.close)
    return comparer


def release() -> None:
    """End the pool of this process, if there is one; the next use makes another."""
    if shared.cache_info().currsize:
        shared().close()
        shared.cache_clear()
