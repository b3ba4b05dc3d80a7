"""Run one stage of a training chain as a supervised child process, and leave nothing behind.

verl waits for ever when a worker dies; Ray and vLLM start dozens of processes, some in sessions of their own, and each
run leaves shared-memory segments in /dev/shm. `run_stage` watches a stage for progress. When it ends, for whatever
reason, every process below it is ended and the segments that only those processes used are removed. `RunLock` keeps two
runs out of one folder. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

FATAL_GRACE = 15.0  # seconds a stage may go on after it wrote a fatal line
LINGER = 10.0  # seconds that processes may outlive a stage that succeeded
TERM_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
KILL_GRACE = 30.0  # seconds after SIGKILL before a process counts as unkillable: freeing a GPU takes some
SCAN_EVERY = 3.0  # seconds between two scans of the processes
SCAN_SHARE = 0.01  # share of one core that scans may use; they get rarer where they cost more
STEP = 0.1  # seconds between two looks at the child
SHM = Path("/dev/shm")
UNKILLABLE = (
    "do not end, not even with SIGKILL",
    "they are blocked in the kernel, mostly in a GPU driver: restart the machine or the container",
)
Segment = tuple[str, int]  # name in /dev/shm and inode: a name may be used again

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


class StageError(RuntimeError):
    """A stage failed; the message says which, what happened, where the log is, how it ends and what to do."""


class RunLockError(RuntimeError):
    """Another process works in the run folder."""


@dataclass(frozen=True)
class StageResult:
    """`seconds`: run time of the command; `peak_memory_bytes`: highest sampled memory of all its processes together."""

    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class CleanUp:
    """What `clean_up_after_crash` ended (process ids) and removed (names in /dev/shm)."""

    processes: list[int] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)


class _Process(NamedTuple):
    parent: int
    session: int
    start: int  # clock ticks after boot: with the pid it names a process for good, and no change of the clock moves it
    alive: bool


def _read(path: str) -> bytes:
    """The content of a /proc file; empty where the process is gone or belongs to someone else."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall() or b""
    except OSError:
        return b""


def _process(pid: int) -> _Process | None:
    if not (data := _read(f"/proc/{pid}/stat")):
        return None
    fields = data[data.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
    # A zombie that still has other threads is a process whose main thread ended first: it lives.
    alive = fields[0] not in (b"Z", b"X") or int(fields[17]) > 1
    return _Process(int(fields[1]), int(fields[3]), int(fields[19]), alive)


def _process_table() -> dict[int, _Process]:
    return {int(name): entry for name in os.listdir("/proc") if name.isdigit() and (entry := _process(int(name)))}


def _with_descendants(roots: Iterable[int], table: Mapping[int, _Process]) -> dict[int, int]:
    """The living processes among `roots` and below them, as {pid: start}, without this process."""
    children = defaultdict(list)
    for pid, entry in table.items():
        children[entry.parent].append(pid)
    found, queue = {}, list(roots)
    while queue:
        pid = queue.pop()
        if pid not in found and pid != os.getpid() and table[pid].alive:
            found[pid] = table[pid].start
            queue += children[pid]
    return found


def _end(living: Callable[[], dict[int, int]]) -> list[int]:
    """SIGTERM, later SIGKILL, to all that `living` names, asked anew each round as they may fork; returns the rest."""
    for signum, patience in ((signal.SIGTERM, TERM_GRACE), (signal.SIGKILL, KILL_GRACE)):
        until, signalled = time.monotonic() + patience, set()
        while (left := living()) and time.monotonic() < until:
            for pid, start in left.items() - signalled:
                # Looked up again right before the signal: never a process that merely got the same number.
                if (now := _process(pid)) and now.start == start:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signum)
            signalled |= left.items()
            time.sleep(STEP / 2)
    return sorted(left)


def _segments() -> dict[Segment, int]:
    """The regular files of /dev/shm and the memory that each takes, in bytes."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(SHM) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    found[entry.name, stat.st_ino] = stat.st_blocks * 512
    return found


def _mapped(pid: int) -> set[Segment]:
    """The files of /dev/shm that a process maps (those already unlinked have a name that is not in /dev/shm)."""
    data, found = _read(f"/proc/{pid}/maps"), set()
    for hit in re.finditer(rb"/dev/shm/([^\n]+)", data):
        inode = data[max(0, hit.start() - 120) : hit.start()].split()[-1]  # the column before the path
        if inode.isdigit() and not hit[1].endswith(b" (deleted)"):
            found.add((os.fsdecode(hit[1]), int(inode)))
    return found


def _remove(segments: Iterable[Segment]) -> list[str]:
    """Unlink the segments that still exist and that no living process maps; returns their names."""
    unused = _segments().keys() & set(segments)
    for pid in _process_table() if unused else ():
        unused -= _mapped(pid)
    removed = []
    for name, _ in sorted(unused):
        with contextlib.suppress(OSError):
            (SHM / name).unlink()
            removed.append(name)
    return removed


def _boot() -> str:
    return _read("/proc/sys/kernel/random/boot_id").decode().strip() or socket.gethostname()


class _Tree:
    """The processes below a stage and the segments they made, found by scanning and recorded in a file."""

    def __init__(self, record: Path) -> None:
        self.record, self.recorded = record, ""
        self.child = self.peak = self.shm_changed = 0
        self.before, self.segments = _segments().keys(), set[Segment]()
        self.started = time.monotonic()
        self.next_scan = self.earliest_scan = 0.0
        # The stage starts in a new session, and no process can join an old one: whoever is in a session that was there
        # before belongs to the caller.
        table, me = _process_table(), os.getpid()
        self.origin = {"boot": _boot(), "supervisor": [me, table[me].start]}
        own = _with_descendants([pid for pid, entry in table.items() if entry.parent == me], table)
        self.other_sessions = {table[pid].session for pid in (me, *own)}

    def living(self) -> dict[int, int]:
        """Every living process of the stage, as {pid: start}. Its orphans are our children, and ours to reap."""
        table, roots = _process_table(), []
        for pid, entry in table.items():
            if entry.parent == os.getpid() and entry.session not in self.other_sessions:
                roots.append(pid)
                if not entry.alive and pid != self.child:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
        return _with_descendants(roots, table)

    def scan_if_due(self) -> None:
        """Scan now and then, and soon after a change in /dev/shm: who made a segment may die before the next scan."""
        changed, now = SHM.stat().st_mtime_ns if SHM.exists() else 0, time.monotonic()
        if now >= (self.next_scan if changed == self.shm_changed else self.earliest_scan):
            began = time.thread_time()
            self.scan()
            self.earliest_scan = now + (time.thread_time() - began) / SCAN_SHARE
            # Often at first, while the tree grows.
            self.next_scan = max(now + min(SCAN_EVERY, now - self.started), self.earliest_scan)
            self.shm_changed = changed

    def scan(self) -> None:
        """Update processes, segments, peak memory and the record."""
        living, listing = self.living(), _segments()
        self.segments &= listing.keys()
        unknown = listing.keys() - self.before - self.segments
        for pid in living if unknown else ():  # /proc/<pid>/maps is the costly part
            self.segments |= unknown & _mapped(pid)
        # What each process holds privately, and each segment once. PSS would be exact, at milliseconds per process.
        memory = sum(listing[segment] for segment in self.segments)
        for pid in living:
            if pages := _read(f"/proc/{pid}/statm").split():
                memory += (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
        self.peak = max(self.peak, memory)
        state = {"processes": sorted(living.items()), "segments": sorted(self.segments)}
        text = json.dumps(self.origin | state)
        if text != self.recorded:
            # A full disk must not end the stage: the record only matters if the supervisor is killed.
            with contextlib.suppress(OSError):
                temporary = self.record.with_name(self.record.name + ".tmp")
                temporary.write_text(text)
                os.replace(temporary, self.record)
                self.recorded = text

    def close(self, linger: Callable[[], bool]) -> tuple[list[int], list[str]]:
        """End what is left, after LINGER seconds while `linger()`; returns the unkillable and the removed segments."""
        self.scan()
        until = time.monotonic() + LINGER
        while linger() and time.monotonic() < until and self.living():
            time.sleep(STEP)
        self.scan()
        survivors = _end(self.living)
        removed = _remove(self.segments)
        if not survivors:
            self.record.unlink(missing_ok=True)
        return survivors, removed


def clean_up_after_crash(path: Path) -> CleanUp:
    """End the processes and remove the segments that a killed supervisor recorded in `path` (`<log>.processes.json`).

    Only processes whose pid and start time both match (and what runs below them) are ended; only recorded segments that
    no living process maps are removed. Nothing happens where the file is missing, or older than the last boot.

    Raises:
        StageError: the file is damaged, its supervisor still runs, or a process could not be killed.
    """
    try:
        data = json.loads(path.read_text())
        boot, (supervisor, supervisor_start) = data["boot"], data["supervisor"]
        known = {int(pid): int(start) for pid, start in data["processes"]}
        segments = {(str(name), int(inode)) for name, inode in data["segments"]}
    except FileNotFoundError:
        return CleanUp()
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{path} should list what a killed run left behind but cannot be read ({error!r}); nothing was ended.\n"
            f"Look for its processes (ps -ef) and segments (ls {SHM}) yourself, then delete the file and start again."
        ) from error
    table, ended, removed = _process_table(), set(), []
    if boot == _boot():
        holder = table.get(supervisor)
        if holder and holder.alive and holder.start == supervisor_start and supervisor != os.getpid():
            raise StageError(
                f"{path}: its stage is still run by process {supervisor}; wait for it, or stop it: kill {supervisor}"
            )

        def living() -> dict[int, int]:
            table = _process_table()
            roots = [pid for pid, start in known.items() if pid in table and table[pid].start == start]
            found = _with_descendants(roots, table)
            known.update(found)  # who runs below a process that dies now is not found below it any more
            ended.update(found)
            return found

        if survivors := _end(living):
            raise StageError(f"Processes {survivors} of an earlier run ({path}) {UNKILLABLE[0]}; {UNKILLABLE[1]}")
        removed = _remove(segments)
    path.unlink(missing_ok=True)
    return CleanUp(sorted(ended), removed)


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
        reader, tree = _Log(log, fatal), _Tree(record)
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
    tree: _Tree,
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


_lock_files: set[int] = set()


def _drop_locks() -> None:
    """In a child made by fork without exec: its copy of the descriptor would keep the lock after the holder's end."""
    for descriptor in _lock_files:
        os.close(descriptor)
    _lock_files.clear()


os.register_at_fork(after_in_child=_drop_locks)


class RunLock:
    """Context manager that holds `folder/.lock`, so that two runs never share a folder; the kernel frees it at death.

    Raises:
        RunLockError: on entering, when it is held already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> RunLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # Python adds O_CLOEXEC
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self.descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(self.descriptor)
            advice = "wait for that run, stop it, or choose another folder"
            raise RunLockError(f"Run folder {self.folder} is in use by {holder}; {advice}") from None
        _lock_files.add(self.descriptor)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor in _lock_files:  # not in a fork of the holder
            # The file stays: removing it would let two processes lock two different files of that name.
            os.ftruncate(self.descriptor, 0)
            _lock_files.discard(self.descriptor)
            os.close(self.descriptor)
