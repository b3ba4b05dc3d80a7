"""What a stage leaves behind: its processes, found wherever they hide, and its shared-memory segments.

`ProcessTree` follows the processes below this one that a stage started, and the segments in /dev/shm that they made;
`clean_up_after_crash` does the same from the record that a killed supervisor left. Only processes whose pid and start
time both match are ever signalled. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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


class StageError(RuntimeError):
    """A stage failed; the message says which, what happened, where the log is, how it ends and what to do."""


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


class ProcessTree:
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
        removed = _remove(self.segments | self._orphaned_semaphores())
        if not survivors:
            self.record.unlink(missing_ok=True)
        return survivors, removed

    def _orphaned_semaphores(self) -> set[Segment]:
        """Semaphores of Python's multiprocessing that came up during the stage, by makers too short-lived to be seen.

        A maker maps its semaphore for as long as it is of use, so :func:`_remove` spares those of other runs.
        """
        found = set()
        for name, inode in _segments().keys() - self.before:
            with contextlib.suppress(OSError):
                if name.startswith("sem.mp-") and (SHM / name).stat().st_uid == os.getuid():
                    found.add((name, inode))
        return found


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
