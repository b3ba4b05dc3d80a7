"""Run one stage of a training chain as a supervised child process, and leave nothing behind.

verl waits for ever when a worker dies; Ray and vLLM start dozens of processes, some in sessions of their own, and each
run leaves shared-memory segments in /dev/shm. `run_stage` watches a stage for progress. When it ends, for whatever
reason, every process below it is ended and the segments that only those processes used are removed (`leftovers`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from parallel_r1.leftovers import STEP, UNKILLABLE, ProcessTree, StageError, clean_up_after_crash

FATAL_GRACE = 15.0  # seconds a stage may go on after it wrote a fatal line

# The child must die with the supervisor (PR_SET_PDEATHSIG = 1). This program sets that and becomes the command, instead
# of a `preexec_fn`, which runs Python between fork and exec and can deadlock in a process that has threads. Python
# ignores SIGPIPE and SIGXFSZ, and exec would hand that on to the command.
_SHIM = """\
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
if os.getppid() != parent:
    os._exit(1)  # the supervisor died before prctl could notice
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.stderr.write(f"cannot run {command[0]!r}: {error}\\n")
    sys.exit(127)
"""


@dataclass(frozen=True)
class StageResult:
    """`seconds`: run time of the command; `peak_memory_bytes`: highest sampled memory of all its processes together."""

    seconds: float
    peak_memory_bytes: int


class _Log:
    """Follows a log and reads nothing twice; `found` holds its first error line and its first fatal line."""

    def __init__(self, path: Path, fatal: Sequence[str]) -> None:
        self.file, self.rest = open(path, "rb"), b""
        self.begin = self.file.seek(0, os.SEEK_END)
        self.found: dict[str, str] = {}
        self.patterns = {"error": re.compile(rb"\b\w*(?:Error|Exception): ")}
        if fatal:
            self.patterns["fatal"] = re.compile(b"|".join(re.escape(text.encode()) for text in fatal))

    def read(self) -> int:
        """Read what is new; returns the size of the log in bytes."""
        size = os.fstat(self.file.fileno()).st_size
        if size < self.file.tell():  # someone emptied it
            self.begin = self.file.seek(0)
        while chunk := self.file.read(1 << 20):
            text = self.rest + chunk
            for kind in self.patterns.keys() - self.found.keys():
                if hit := self.patterns[kind].search(text):
                    self.found[kind] = _readable(text[text.rfind(b"\n", 0, hit.start()) + 1 :].split(b"\n", 1)[0])
            self.rest = text[text.rfind(b"\n") + 1 :][-4096:]
        return size

    def tail(self, count: int = 15) -> list[str]:
        """The last lines that say something: no blank lines, rules, progress bars or repetitions."""
        self.file.seek(max(self.begin, self.file.seek(0, os.SEEK_END) - (1 << 16)))
        lines: list[str] = []
        for line in map(_readable, re.split(rb"[\r\n]+", self.file.read())):
            if re.search(r"\w", line) and not re.search(r"\d%\|", line) and line not in lines[-1:]:
                lines.append(line)
        return lines[-count:]


def _readable(line: bytes) -> str:
    """One log line without terminal colours, cut to a length that fits an error message."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode(errors="replace")).strip()[:300]


@contextlib.contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Only note SIGINT, SIGTERM and SIGHUP, and act on the first at the end: no clean-up stops half-way."""
    received: list[int] = []
    previous = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # ignored under nohup, or in a background job
                previous[signum] = signal.signal(signum, lambda number, _: received.append(number))
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Make orphans below this process its children, so that a daemon cannot leave the tree."""
    prctl, was = ctypes.CDLL(None, use_errno=True).prctl, ctypes.c_int()
    prctl(37, ctypes.byref(was), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    if prctl(36, 1, 0, 0, 0):  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; it needs Linux 3.4 or later")
    try:
        yield
    finally:
        prctl(36, was.value, 0, 0, 0)


def run_stage(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    deadline: float,
    stall: float,
    progress: Callable[[], object] | None = None,
    on_tick: Callable[[float], None] | None = None,
    tick: float = 1.0,
    fatal: Sequence[str] = (),
) -> StageResult:
    """Run `command` under a watchdog, its output appended to `log`; then end and remove all that it left behind.

    `env` is added to this process's environment. The stage is ended when `progress()` (default: the size of the log)
    keeps its value for `stall` seconds, when it runs for `deadline` seconds, and 15 s after one of the texts in `fatal`
    came up in the log; a stage that ends with exit code 0 has succeeded, whatever it logged. `on_tick(elapsed)` is
    called every `tick` seconds. Ctrl-C, SIGTERM and SIGHUP end the stage and then raise KeyboardInterrupt or
    SystemExit(128 + signal).

    Meanwhile the caller must start no processes in new sessions: they would be taken for the stage's. Memory is what
    the processes hold privately plus their segments in /dev/shm, sampled about every 3 s; shared memory without a name
    (Ray's object store) is not in it.

    Raises:
        StageError: the stage failed or was ended, or a process of it, or of an earlier run, cannot be.
        RuntimeError: called outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread gets signals, and the child would be killed when the thread that started it ends.
        raise RuntimeError(f"run_stage({name!r}) was called in another thread; call it in the main thread")
    log = Path(log).absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    record = log.with_name(log.name + ".processes.json")
    clean_up_after_crash(record)
    argv, failure, child, succeeded = [os.fspath(part) for part in command], None, None, False
    with _signals_held() as received, _subreaper(), open(log, "ab", buffering=0) as output:
        output.write(f"# {_now()} {name}: {shlex.join(argv)}\n".encode())
        reader, tree = _Log(log, fatal), ProcessTree(record)
        try:
            shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid())]
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            environment = {**os.environ, **(env or {})}
            child = subprocess.Popen(shim + argv, **streams, env=environment, cwd=cwd, start_new_session=True)
            tree.child = child.pid
            failure = _watch(child, tree, reader, received, deadline, stall, progress, on_tick, tick)
            succeeded = failure is None
            reader.read()
            tail = reader.tail()  # now: what the processes write when they are ended would hide the cause
        finally:
            seconds = time.monotonic() - tree.started
            survivors, removed = tree.close(linger=lambda: succeeded and not received)
            if child and child.pid not in survivors:
                child.wait()
            reader.file.close()
            summary = f"{seconds:.1f} s, peak memory {tree.peak / 2**30:.2f} GiB, segments removed: {len(removed)}"
            with contextlib.suppress(OSError):  # a full disk
                output.write(f"# {_now()} end of {name}: {summary}\n".encode())
    if survivors:
        what = failure[0] if failure else "it ended"
        failure = f"{what}, and its processes {survivors} {UNKILLABLE[0]}", UNKILLABLE[1]
    if failure is None:
        return StageResult(seconds, tree.peak)
    lines = [f"Stage {name!r} failed after {seconds:.0f} s: {failure[0]}.", f"Log: {log}"]
    lines += [f"First {kind} line: {line}" for kind, line in sorted(reader.found.items()) if line not in tail]
    lines += ["Last lines:", *(f"  | {line}" for line in tail)] if tail else ["It wrote nothing to the log."]
    raise StageError("\n".join([*lines, f"What to do: {failure[1]}."]))


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")


def _watch(
    child: subprocess.Popen[bytes],
    tree: ProcessTree,
    reader: _Log,
    received: Sequence[int],
    deadline: float,
    stall: float,
    progress: Callable[[], object] | None,
    on_tick: Callable[[float], None] | None,
    tick: float,
) -> tuple[str, str] | None:
    """Wait for the child; returns what went wrong and what to do about it, or None after a success or a signal."""
    changed = next_tick = tree.started
    value, fatal_since = object(), None
    while (code := child.poll()) is None and not received:
        tree.scan_if_due()
        now = time.monotonic()
        if now >= next_tick:
            next_tick = now + tick
            size = reader.read()
            if (latest := progress() if progress else size) != value:
                value, changed = latest, now
            if on_tick:
                on_tick(now - tree.started)
            if now - changed >= stall:
                advice = "a worker has died or hangs: look for the first error in the log; allow more time if one step"
                return f"no progress for {stall:g} s (stayed at {value!r})", f"{advice} can take that long"
        if fatal_since is None and "fatal" in reader.found:
            fatal_since = now
        if fatal_since is not None and now - fatal_since >= FATAL_GRACE:
            what = f"it did not end within {FATAL_GRACE:g} s of a fatal message: {reader.found['fatal']}"
            return what, "look in the log for what that worker wrote before it died"
        if now - tree.started >= deadline:
            advice = "if it was still making progress, allow more time or make the stage smaller"
            return f"over the deadline of {deadline:g} s", advice
        time.sleep(STEP)
    if not code:
        return None
    what = f"exit code {code}" + (f" ({signal.Signals(-code).name})" if code < 0 else "")
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        advice = f"mostly the machine ran out of memory (see dmesg; the highest sample was {tree.peak / 2**30:.2f} GiB)"
        return what, f"{advice}: use a machine with more, or fewer workers"
    return what, "look for the first error in the log"
