"""The supervisor of a stage: real processes, real signals, real shared memory."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import psutil
import pytest

from parallel_r1 import leftovers, supervise
from parallel_r1.leftovers import CleanUp, StageError, clean_up_after_crash
from parallel_r1.run_lock import RunLock, RunLockError
from parallel_r1.supervise import StageResult, run_stage

pytestmark = pytest.mark.timeout(40)
SHM = Path("/dev/shm")

# A stage with one process per word of traits. Each notes its pid, and the segment it made, as a file in the folder.
# None lives longer than a minute, should the supervisor be at fault.
STAGE = """
import os, signal, subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory

folder, end, *workers = sys.argv[1:]

def note(text=""):
    path = os.path.join(folder, str(os.getpid()))
    with open(path + "~", "w") as file:
        file.write(text)
    os.rename(path + "~", path)

if end == "worker":
    if "daemon" in workers[0] and (os.fork() or os.setsid() or os.fork()):
        os._exit(0)
    if "stubborn" in workers[0]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource_tracker.register = lambda *_: None  # the tracker would remove the segments
    if "attach" in workers[0]:
        earlier = shared_memory.SharedMemory(workers[0].partition("=")[2])
    if "segment" in workers[0]:
        segment = shared_memory.SharedMemory(create=True, size=1 << 20)
    note(segment.name if "segment" in workers[0] else "")
    time.sleep(1 if "brief" in workers[0] else 60)
    open(os.path.join(folder, "finished"), "w").close()
    sys.exit()

for traits in workers:
    argv = [sys.executable, "-I", "-S", __file__, folder, "worker", traits]
    subprocess.Popen(argv, start_new_session="session" in traits)
note()
while sum(name.isdigit() for name in os.listdir(folder)) <= len(workers):
    time.sleep(0.02)
print("ready", flush=True)
if end == "wait":
    time.sleep(60)
sys.exit(int(end))
"""

SUPERVISOR = """
import signal, sys
from pathlib import Path
from parallel_r1 import leftovers, supervise

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run as a background job
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
leftovers.TERM_GRACE = 1.0
supervise.run_stage("train", sys.argv[2:], log=Path(sys.argv[1]), deadline=60, stall=60)
"""

EVERY_KIND = ["plain", "session", "daemon", "session+stubborn+segment", "daemon+stubborn+segment"]


class Stage:
    """A stage in a folder, and what became of its processes and segments."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "stage.log"
        self.record = folder / "stage.log.processes.json"
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.script = folder / "stage.py"
        self.script.write_text(STAGE)

    def command(self, end: str, *workers: str) -> list[str]:
        return [sys.executable, "-I", "-S", str(self.script), str(self.notes), end, *workers]

    def pids(self) -> list[int]:
        return [int(path.name) for path in self.notes.iterdir() if path.name.isdigit()]

    def segments(self) -> list[str]:
        return [name for path in self.notes.iterdir() if path.name.isdigit() and (name := path.read_text())]

    def ready(self) -> bool:
        return self.log.exists() and "\nready\n" in self.log.read_text()

    def recorded(self) -> bool:
        """All processes and segments are in the record."""
        data = json.loads(self.record.read_text()) if self.record.exists() else {"processes": [], "segments": []}
        pids, segments = ({key for key, _ in data[part]} for part in ("processes", "segments"))
        return self.ready() and set(self.pids()) <= pids and set(self.segments()) <= segments

    def check_nothing_left(self, processes: int, segments: int = 0) -> None:
        assert len(self.pids()) == processes and len(self.segments()) == segments  # else there was nothing to end
        assert [pid for pid in self.pids() if alive(pid)] == []
        assert [name for name in self.segments() if (SHM / name).exists()] == []
        assert not self.record.exists()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(leftovers, "TERM_GRACE", 0.5)
    monkeypatch.setattr(leftovers, "LINGER", 2.0)
    monkeypatch.setattr(supervise, "FATAL_GRACE", 1.0)
    stage = Stage(tmp_path)
    yield stage
    for process in psutil.process_iter(["cmdline"]):  # where the supervisor failed
        if str(stage.notes) in (process.info["cmdline"] or []):
            process.kill()
    for name in stage.segments():
        (SHM / name).unlink(missing_ok=True)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no test may end."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def shell(script: str) -> list[str]:
    return ["bash", "-c", script]


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


# The watchdog


def test_a_success_has_its_output_in_the_log_and_nothing_on_the_terminal(stage, tmp_path, capfd):
    ticks: list[float] = []
    stage.log.write_text("an earlier run\n")
    command = shell("echo to stdout; echo to stderr >&2; echo value $SUPERVISE_TEST in $PWD; sleep 0.5")
    more = {"env": {"SUPERVISE_TEST": "7"}, "cwd": tmp_path, "on_tick": ticks.append, "tick": 0.1}
    result = run_stage("train", command, log=stage.log, deadline=20, stall=20, **more)
    lines = stage.log.read_text().splitlines()
    assert lines[0] == "an earlier run" and "train: bash -c" in lines[1]
    assert lines[2:5] == ["to stdout", "to stderr", f"value 7 in {tmp_path}"]
    assert isinstance(result, StageResult) and 0.5 <= result.seconds < 10 and result.peak_memory_bytes > 0
    assert len(ticks) >= 3 and ticks == sorted(ticks)
    assert capfd.readouterr() == ("", "") and not stage.record.exists()


def test_an_exit_code_is_reported_with_the_first_error_and_the_last_lines(stage):
    script = "echo 'ValueError: the cause'; for i in {1..40}; do echo line $i; echo; done; echo ' 7%|#  | 1/9'; exit 3"
    with pytest.raises(StageError) as caught:
        run_stage("train", shell(script), log=stage.log, deadline=20, stall=20)
    message = str(caught.value)
    assert "'train'" in message and "exit code 3" in message and str(stage.log) in message
    assert "ValueError: the cause" in message and "| line 40" in message and "| line 26" in message
    assert "| line 25" not in message and "1/9" not in message and "What to do" in message


@pytest.mark.parametrize("name", ["SEGV", "KILL"])
def test_death_by_a_signal_is_reported_by_name(stage, name):
    with pytest.raises(StageError, match=rf"exit code -\d+ \(SIG{name}\)") as caught:
        run_stage("train", shell(f"kill -{name} $$"), log=stage.log, deadline=20, stall=20)
    assert ("memory" in str(caught.value)) == (name == "KILL")


def test_a_command_that_does_not_exist_is_named(stage):
    with pytest.raises(StageError, match="cannot run 'no-such-program': .*No such file"):
        run_stage("train", ["no-such-program"], log=stage.log, deadline=20, stall=20)


def test_a_silent_stage_is_stalled_and_a_talking_one_is_not(stage):
    with pytest.raises(StageError, match="no progress for 0.8 s"):
        run_stage("train", stage.command("wait"), log=stage.log, deadline=30, stall=0.8, tick=0.1)
    stage.check_nothing_left(processes=1)
    farewell = shell("trap 'echo SIGTERM received; exit' TERM; echo the cause; sleep 60 & wait")
    with pytest.raises(StageError, match="the cause") as caught:
        run_stage("train", farewell, log=stage.log, deadline=30, stall=0.8, tick=0.1)
    assert "SIGTERM received" in stage.log.read_text() and "SIGTERM" not in str(caught.value)
    talking = shell("for i in {1..11}; do echo $i; sleep 0.25; done")
    run_stage("train", talking, log=stage.log, deadline=30, stall=2.5, tick=0.1)


def test_output_is_no_progress_where_progress_is_given(stage):
    talking = shell("for i in {1..100}; do echo $i; sleep 0.1; done")
    with pytest.raises(StageError, match=r"no progress for 0.8 s \(stayed at 5\)"):
        run_stage("train", talking, log=stage.log, deadline=30, stall=0.8, progress=lambda: 5, tick=0.1)
    steps = iter(range(1000))
    quiet = ["sleep", "1.5"]
    run_stage("train", quiet, log=stage.log, deadline=30, stall=0.8, progress=lambda: next(steps), tick=0.1)


def test_a_stage_over_its_deadline_is_ended(stage):
    with pytest.raises(StageError, match="over the deadline of 1.5 s"):
        run_stage("train", stage.command("wait", "plain"), log=stage.log, deadline=1.5, stall=60)
    stage.check_nothing_left(processes=2)


def test_a_fatal_line_ends_a_stage_that_hangs(stage):
    # Written in two halves, so that one look at the log does not see the whole text. The text in the command, which is
    # in the log's first line, does not count.
    script = "sleep 0.5; printf 'x\\n(pid=7) EngineDead'; sleep 0.8; echo 'Error: gone'; sleep 60"
    more = {"fatal": ["Worker failed", "EngineDeadError"], "tick": 0.1}
    began = time.monotonic()
    with pytest.raises(StageError, match=r"fatal message: \(pid=7\) EngineDeadError"):
        run_stage("train", shell(script), log=stage.log, deadline=30, stall=30, **more)
    assert 2.3 <= time.monotonic() - began < 15


def test_a_stage_that_succeeds_after_a_fatal_line_has_succeeded(stage):
    run_stage(
        "train",
        shell("echo EngineDeadError; sleep 0.5"),
        log=stage.log,
        deadline=30,
        stall=30,
        fatal=["EngineDeadError"],
    )


def test_memory_counts_private_pages_and_each_segment_once(stage):
    size = 64 << 20
    script = f"""
import os, time
from multiprocessing import shared_memory
segment = shared_memory.SharedMemory(create=True, size={size})
segment.buf[:] = bytes([1]) * {size}
if os.fork() == 0:
    own = bytearray(b"x") * {size}
    sum(segment.buf[::4096])
    time.sleep(5)  # scans are up to 3 s apart
    os._exit(0)
os.wait()
segment.unlink()
"""
    result = run_stage("train", [sys.executable, "-c", script], log=stage.log, deadline=30, stall=30)
    assert 2 * size <= result.peak_memory_bytes < 2.8 * size


# What outlives a stage


@pytest.mark.parametrize("end", ["0", "3"])
def test_every_kind_of_process_and_its_segment_are_gone_at_the_end(stage, end):
    command = stage.command(end, *EVERY_KIND)
    if end == "0":
        run_stage("train", command, log=stage.log, deadline=30, stall=30)
    else:
        with pytest.raises(StageError, match="exit code 3"):
            run_stage("train", command, log=stage.log, deadline=30, stall=30)
    stage.check_nothing_left(processes=6, segments=2)


def test_processes_that_end_soon_after_a_success_may_finish(stage):
    run_stage("train", stage.command("0", "daemon+brief"), log=stage.log, deadline=30, stall=30)
    assert (stage.notes / "finished").exists()
    stage.check_nothing_left(processes=2)


def test_an_error_in_a_callback_ends_the_stage_too(stage):
    def on_tick(elapsed: float) -> None:
        if stage.ready():
            raise LookupError("broken progress line")

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(LookupError):
        run_stage("train", stage.command("wait", *EVERY_KIND), log=stage.log, deadline=30, stall=30, on_tick=on_tick)
    stage.check_nothing_left(processes=6, segments=2)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    subreaper = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(37, ctypes.byref(subreaper), 0, 0, 0)
    assert subreaper.value == 0


def test_the_callers_own_processes_live_on(stage, bystander):
    started: list[subprocess.Popen[bytes]] = []

    def on_tick(elapsed: float) -> None:
        if not started:
            started.append(subprocess.Popen(["sleep", "60"]))

    try:
        run_stage("train", ["sleep", "1"], log=stage.log, deadline=30, stall=30, on_tick=on_tick)
        assert alive(bystander.pid) and alive(started[0].pid)
    finally:
        started[0].kill()
        started[0].wait()


def test_only_the_segments_of_the_stage_are_removed(stage, monkeypatch):
    monkeypatch.setattr(resource_tracker, "register", lambda *_: None)
    monkeypatch.setattr(resource_tracker, "unregister", lambda *_: None)
    mine = {"before": shared_memory.SharedMemory(create=True, size=4096)}
    mine["before"].close()  # only the stage maps it from here on
    other = [sys.executable, "-I", "-S", str(stage.script), str(stage.log.parent / "other"), "worker"]
    (stage.log.parent / "other").mkdir()
    others: list[subprocess.Popen[bytes]] = []

    def on_tick(elapsed: float) -> None:
        if not others and stage.ready():
            mine["meanwhile"] = shared_memory.SharedMemory(create=True, size=4096)
            mine["no longer mapped"] = shared_memory.SharedMemory(create=True, size=4096)
            mine["no longer mapped"].close()
            # Made by the stage, and in use outside it when the stage ends.
            mine["shared"] = shared_memory.SharedMemory(stage.segments()[0])
            others.append(subprocess.Popen([*other, "segment"]))

    names: list[str] = []
    try:
        command = stage.command("wait", "session+segment", "plain+segment", f"attach={mine['before'].name}")
        with pytest.raises(StageError, match="deadline"):
            run_stage("train", command, log=stage.log, deadline=3, stall=30, on_tick=on_tick, tick=0.1)
        [pid] = [path for path in (stage.log.parent / "other").iterdir()]
        names = [segment.name for segment in mine.values()] + [pid.read_text()]
        assert len(set(names)) == 5 and all((SHM / name).exists() for name in names)
        made = stage.segments()
        assert len(made) == 2 and [name for name in made if (SHM / name).exists()] == [mine["shared"].name]
    finally:
        for process in others:
            process.kill()
            process.wait()
        for name in {*names, *(segment.name for segment in mine.values())}:
            (SHM / name).unlink(missing_ok=True)


def test_a_segment_whose_maker_lives_for_less_than_a_scan_interval_is_removed(stage):
    # The regular scans of a stage are at about 1.6 s and 3.2 s after its start.
    brief = stage.command("worker", "brief+segment")
    run_stage("train", [*shell('sleep 1.8; exec "$@"'), "bash", *brief], log=stage.log, deadline=30, stall=30)
    stage.check_nothing_left(processes=1, segments=1)


# The end of the supervisor


@pytest.fixture
def supervisor(stage: Stage) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor in a process of its own, with every kind of process below it."""
    command = [sys.executable, "-c", SUPERVISOR, str(stage.log), *stage.command("wait", *EVERY_KIND)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            until(stage.recorded)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_supervisor_leaves_nothing(stage, supervisor, signum, code):
    supervisor.send_signal(signum)
    # An impatient user: the stubborn processes make the clean-up last a second, and nothing may stop it half-way.
    for _ in range(4):
        time.sleep(0.15)
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(timeout=20) == code
    stage.check_nothing_left(processes=6, segments=2)


@pytest.mark.parametrize("how", ["clean_up_after_crash", "run_stage"])
def test_what_a_killed_supervisor_left_is_cleaned_up(stage, supervisor, how):
    supervisor.kill()
    supervisor.wait()
    child = json.loads(stage.record.read_text())["processes"]
    until(lambda: sum(alive(pid) for pid, _ in child) == 5)  # the child died with its supervisor, the others did not
    left, segments = sorted(pid for pid, _ in child if alive(pid)), stage.segments()
    if how == "run_stage":
        run_stage("again", ["true"], log=stage.log, deadline=20, stall=20)
    else:
        cleaned = clean_up_after_crash(stage.record)
        assert cleaned.processes == left and sorted(cleaned.segments) == sorted(segments)
        assert clean_up_after_crash(stage.record) == CleanUp()
    stage.check_nothing_left(processes=6, segments=2)


def test_a_running_supervisor_is_left_alone(stage, supervisor):
    with pytest.raises(StageError, match=f"still run by process {supervisor.pid}"):
        clean_up_after_crash(stage.record)
    assert len(stage.pids()) == 6 and all(alive(pid) for pid in stage.pids()) and stage.record.exists()


@pytest.mark.parametrize("case", ["the same process", "a recycled pid", "another boot"])
def test_only_the_recorded_process_is_ended(stage, bystander, case):
    start = start_ticks(bystander.pid) + (case == "a recycled pid")
    boot = "earlier" if case == "another boot" else leftovers._boot()
    state = {"boot": boot, "supervisor": [bystander.pid, 1], "processes": [[bystander.pid, start]], "segments": []}
    stage.record.write_text(json.dumps(state))
    ended = clean_up_after_crash(stage.record).processes
    assert ended == ([bystander.pid] if case == "the same process" else [])
    assert alive(bystander.pid) == (case != "the same process")
    assert not stage.record.exists()


def test_a_segment_that_took_the_name_of_a_recorded_one_is_kept(stage):
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        inode = (SHM / segment.name).stat().st_ino
        segment.close()
        state = {"boot": leftovers._boot(), "supervisor": [1, 1], "processes": []}
        for recorded, removed in ((inode + 1, []), (inode, [segment.name])):
            stage.record.write_text(json.dumps(state | {"segments": [[segment.name, recorded]]}))
            assert clean_up_after_crash(stage.record).segments == removed
            assert (SHM / segment.name).exists() == (not removed)
    finally:
        resource_tracker.unregister(f"/{segment.name}", "shared_memory")
        (SHM / segment.name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    "text", ["", '{"boot": "x", "proc', "[1, 2]", '{"boot": "x"}', '{pids: [["a", null]]}', "\udcff"]
)
def test_a_damaged_record_ends_nothing_and_says_what_to_do(stage, bystander, text):
    damaged = text.replace("pids", f'"boot": "{leftovers._boot()}", "supervisor": [1, 1], "segments": [], "processes"')
    stage.record.write_bytes(damaged.encode(errors="surrogateescape"))
    with pytest.raises(StageError, match="nothing was ended") as caught:
        clean_up_after_crash(stage.record)
    assert str(stage.record) in str(caught.value) and "delete the file" in str(caught.value)
    assert alive(bystander.pid) and stage.record.exists()


def test_a_stage_is_refused_outside_the_main_thread(stage):
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run_stage("train", ["true"], log=stage.log, deadline=20, stall=20)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0]) and not stage.log.exists()


# The lock


def hold(folder: Path, then: str) -> subprocess.Popen[bytes]:
    """A process that holds the lock of `folder`, runs `then` and says so."""
    script = f"""
import os, subprocess, sys, time
from pathlib import Path
from parallel_r1.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    {then}
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    return process


def test_a_second_holder_is_told_who_holds_the_lock_and_death_frees_it(tmp_path):
    with hold(tmp_path, "pass") as holder:
        with pytest.raises(
            RunLockError, match=rf"{tmp_path} is in use by process {holder.pid} on \S+ since 20"
        ) as caught:
            RunLock(tmp_path).__enter__()
        assert "\n" not in str(caught.value)
        holder.kill()
        holder.wait()
        with RunLock(tmp_path):
            with pytest.raises(RunLockError, match=f"process {os.getpid()} "), RunLock(tmp_path):
                pass
        with RunLock(tmp_path):  # and it is free after a normal end
            pass


@pytest.mark.parametrize("start", ["subprocess.Popen(['sleep', '60'], close_fds=False).pid", "os.fork()"])
def test_the_lock_is_not_inherited(tmp_path, start):
    with hold(
        tmp_path, f"child = {start}; child or time.sleep(60); Path(sys.argv[1], 'child').write_text(str(child))"
    ) as holder:
        child = int((tmp_path / "child").read_text())
        try:
            holder.kill()
            holder.wait()
            assert alive(child)
            with RunLock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_an_inherited_descriptor_would_keep_the_lock(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()]) as child:
            file.close()
            with pytest.raises(RunLockError, match="in use by another process"):
                RunLock(tmp_path).__enter__()
            child.kill()
