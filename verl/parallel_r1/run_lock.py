"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path


class RunLockError(RuntimeError):
    """Another process works in the run folder."""


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
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor in _lock_files:  # not in a fork of the holder
            # The file stays: removing it would let two processes lock two different files of that name.
            os.ftruncate(self.descriptor, 0)
            _lock_files.discard(self.descriptor)
            os.close(self.descriptor)
