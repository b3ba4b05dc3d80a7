"""Can this environment run Parallel-R1? ``parallel-r1 doctor`` prints one `Check` per question, with a remedy.

verl and vLLM only log it when a plug-in cannot be loaded, and go on without. So three checks start what a run starts
(a driver, a Ray worker, a vLLM process) and look there. The module itself imports nothing heavy, and works where half
of the stack is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from parallel_r1.leftovers import StageError
from parallel_r1.supervise import run_stage

GIB = 2**30
DEADLINE = 120.0  # seconds for a check that starts a process; Ray and vLLM take 20 to 40 on two cores
ROOT = Path(__file__).resolve().parents[2]  # the repository, as the package is installed in editable mode
ABSENT = ("torchvision", "torchaudio", "torchcodec", "triton")  # requirements/cpu.txt says why
ANSWER = "parallel-r1 doctor: "  # how a started process marks its answer among log lines
INSTALL = "run training_scripts/install.sh"


@dataclass(frozen=True)
class Check:
    """`found`: what is there; `remedy`: what to do about it, empty where `ok`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def report(checks: Iterable[Check], as_json: bool = False) -> int:
    """Print each check as it is done; returns the exit code, 1 if one failed."""
    done = []
    for check in checks:
        done.append(check)
        if not as_json:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.found}", flush=True)
            if not check.ok:
                print(f"      -> {check.remedy}", flush=True)
    failed = sum(not check.ok for check in done)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in done]}, indent=2))
    else:
        print(f"{failed} of {len(done)} checks failed" if failed else f"all {len(done)} checks passed")
    return int(failed > 0)


def run_checks(quick: bool = False) -> Iterator[Check]:
    """All checks, cheap ones first; `quick` leaves out those that start Ray and vLLM."""
    device = torch_device()
    yield check_python()
    yield check_versions(device)
    yield check_stray_verl()
    yield check_device(device)
    yield check_shared_memory()
    for folder in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir()))):
        yield check_disk(folder)
    yield check_memory()
    yield check_process("verl plug-in in the driver", "driver", device)
    if not quick:
        yield check_process("verl plug-in in a Ray worker", "ray", device)
        yield check_process("vLLM plug-in in a vLLM process", "vllm", device)


def torch_device() -> str:
    """ "cpu" or "cuda", by the build of torch that is installed; "cpu" where none is."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "cpu"
    if version.endswith("+cpu"):
        return "cpu"
    try:
        import torch
    except (ImportError, OSError):  # CUDA libraries missing: the check of the device shows how
        return "cuda"
    return "cuda" if torch.version.cuda else "cpu"


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Python 3.11 or 3.12."""
    ok = (3, 11) <= version < (3, 13)
    remedy = "" if ok else f"{INSTALL} with PYTHON=/path/to/python3.11 and another PARALLEL_R1_VENV"
    return Check("Python", ok, ".".join(map(str, version)), remedy)


def check_versions(device: str, root: Path = ROOT) -> Check:
    """The installed versions against the lock file, every difference listed."""
    from packaging.requirements import Requirement

    name = "versions"
    lock = root / "requirements" / ("cpu.txt" if device == "cpu" else "gpu.txt")
    if not lock.exists():
        remedy = "install from a checkout of the repository: training_scripts/install.sh (it installs in editable mode)"
        return Check(name, False, f"there is no lock file {lock} to compare with", remedy)
    lines = [line.split("#")[0].strip() for line in lock.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    differences = []
    if device == "cpu":
        alias = tomllib.loads((lock.parent / "vllm_alias" / "pyproject.toml").read_text())["project"]
        wanted.append(Requirement(f"{alias['name']}=={alias['version']}"))
        differences = [f"{package} {found} (must not be there)" for package in ABSENT if (found := _version(package))]
    for requirement in wanted:
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            differences.append(f"{requirement.name} {found or 'missing'} (wanted {requirement.specifier})")
    if not differences:
        return Check(name, True, f"{len(wanted)} packages as in {lock.relative_to(root)}")
    remedy = INSTALL + ("" if device == "cpu" else " --gpu")
    if unwanted := [package for package in ABSENT if device == "cpu" and _version(package)]:
        remedy = f"pip uninstall -y {' '.join(unwanted)}; {remedy}"
    return Check(name, False, f"not as in {lock}: {', '.join(differences)}", remedy)


def check_stray_verl(root: Path = ROOT) -> Check:
    """No other package `verl` before the installed one: a forgotten folder with an ``__init__.py`` is enough."""
    name = "no other verl in the way"
    try:
        installed = Path(str(metadata.distribution("verl").locate_file("verl"))).resolve()
    except metadata.PackageNotFoundError:
        return Check(name, False, "verl is not installed", INSTALL)
    before = sys.path[: sys.path.index(str(installed.parent))] if str(installed.parent) in sys.path else sys.path
    places = [Path.cwd(), root, *map(Path, before)]
    strays = [place.resolve() / "verl" for place in places if (place / "verl" / "__init__.py").exists()]
    strays += [place.resolve() / "verl.py" for place in places if (place / "verl.py").exists()]
    spec = importlib.util.find_spec("verl")  # finds what no folder shows, such as a checkout in editable mode
    if spec and spec.origin:
        strays.append(Path(spec.origin).resolve().parent)
    strays = [stray for stray in dict.fromkeys(strays) if stray != installed]
    if not strays:
        return Check(name, True, f"verl is {installed}")
    return Check(
        name,
        False,
        f"{', '.join(map(str, strays))} would be imported instead of {installed}",
        "delete or rename it (our verl/ is only a source folder: an __init__.py there hides verl itself), or take its "
        "folder out of PYTHONPATH; a verl installed with `pip install -e` goes with: pip uninstall verl",
    )


def check_device(device: str) -> Check:
    """The device that training uses."""
    name = "device"
    if (version := _version("torch")) is None:
        return Check(name, False, "torch is not installed", INSTALL)
    if device == "cpu":
        return Check(name, True, f"CPU, {len(os.sched_getaffinity(0))} cores")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name, False, f"torch {version} cannot be imported: {_where(error)}", f"{INSTALL} --gpu")
    if not torch.cuda.is_available():
        remedy = (
            f"look whether nvidia-smi shows one and a driver for CUDA {torch.version.cuda} or later; "
            f"to use the CPU, {INSTALL} with another PARALLEL_R1_VENV"
        )
        return Check(name, False, f"torch {version} finds no GPU", remedy)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Check(name, True, ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus))


def check_shared_memory(folder: Path = Path("/dev/shm"), needed: float = 1.0) -> Check:
    """Ray's objects and the weights on their way to vLLM go through it; `needed` in GiB."""
    return _space("shared memory", folder, needed, "mount -o remount,size=8G /dev/shm, or docker run --shm-size=8g")


def check_disk(folder: Path, needed: float = 5.0) -> Check:
    """Room for checkpoints and temporary files; `needed` in GiB."""
    return _space(f"disk ({folder})", folder, needed, "delete old runs, or work in (or set TMPDIR to) another folder")


def check_memory(
    needed: float = 8.0, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> Check:
    """Memory that a run can still take, in GiB; inside a container its limit counts."""
    name = "memory"
    available = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvail" in line)
    limit = cgroup / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int((cgroup / "memory.current").read_text()))
    found = f"{available / GIB:.1f} GiB available"
    if available >= needed * GIB:
        return Check(name, True, found)
    remedy = f"a run needs {needed:g} GiB: close other programs, raise the container's limit, or use a larger machine"
    return Check(name, False, found, remedy)


def check_process(name: str, kind: str, device: str, deadline: float = DEADLINE) -> Check:
    """Start a process as a run does and ask it for our plug-in; `kind` is a key of `PROBES`."""
    code = f"from parallel_r1 import doctor; doctor.answer({kind!r}, {device!r})"
    by_hand = f'{sys.executable} -c "{code}"'
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
        by_hand = f"VERL_PLATFORM=cpu {by_hand}"
    with tempfile.TemporaryDirectory(prefix="parallel-r1-doctor-") as folder:
        log, began = Path(folder) / "log", time.monotonic()
        command = [sys.executable, "-c", code]
        try:
            run_stage(name, command, log=log, env=environment, deadline=deadline, stall=2 * deadline)
        except StageError as error:
            if time.monotonic() - began >= deadline:
                remedy = f"the machine may be too busy: end other runs and try again; to see where it hangs: {by_hand}"
                return Check(name, False, f"no answer within {deadline:g} s", remedy)
            lines = [line for line in _lines(log) if not line.startswith("# ")] or [str(error).splitlines()[0]]
            return Check(name, False, lines[-1], f"see the whole output: {by_hand}")
        problem = next(line.removeprefix(ANSWER) for line in reversed(_lines(log)) if line.startswith(ANSWER))
    if not problem:
        return Check(name, True, f"loaded ({time.monotonic() - began:.0f} s)")
    return Check(name, False, problem, f"repair the import if one failed, else {INSTALL} again; by hand: {by_hand}")


def answer(kind: str, device: str) -> None:
    """What `check_process` runs in the process that it starts: prints the probe's answer as the last line."""
    print(f"\n{ANSWER}{PROBES[kind](device)}", flush=True)


def why_not_loaded(device: str) -> str:
    """Import verl as every training process does; returns why our plug-in is not active here, or ""."""
    try:
        from verl.plugin.platform import PlatformRegistry
    except Exception as error:
        return f"`import verl` fails: {_where(error)}"
    platforms = PlatformRegistry.registered_names()
    if "parallel_r1.plugin" in sys.modules and (device != "cpu" or "cpu" in platforms):
        return ""
    try:  # verl logs the error at DEBUG level only
        importlib.import_module("parallel_r1.plugin")
    except Exception as error:
        return f"`import parallel_r1.plugin` fails: {_where(error)}"
    entries = [entry.name for entry in metadata.entry_points(group="verl.plugins")]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "unset")
    return (
        "verl did not load the plug-in "
        f"(entry points: {entries}, VERL_USE_EXTERNAL_PLUGINS: {policy}, platforms: {platforms})"
    )


def why_not_loaded_by_ray(device: str) -> str:
    """The same in a worker of a small Ray of our own."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        return ray.get(ray.remote(why_not_loaded).remote(device))
    finally:
        ray.shutdown()


def why_not_loaded_by_vllm(device: str) -> str:
    """Load vLLM's plug-ins as its engine does; returns why ours is not among them, or ""."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    try:  # vLLM logs the error and goes on
        from parallel_r1.rollout import vllm_plugin

        if vllm_plugin.is_registered():
            return ""
        vllm_plugin.register()
    except Exception as error:
        return f"`parallel_r1.rollout.vllm_plugin.register()` fails: {_where(error)}"
    entries = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    policy = os.environ.get("VLLM_PLUGINS", "unset")
    return f"vLLM did not load the plug-in (entry points: {entries}, VLLM_PLUGINS: {policy})"


PROBES = {"driver": why_not_loaded, "ray": why_not_loaded_by_ray, "vllm": why_not_loaded_by_vllm}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _space(name: str, folder: Path, needed: float, remedy: str) -> Check:
    if not folder.exists():
        return Check(name, False, f"{folder} does not exist", remedy)
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free >= needed * GIB:
        return Check(name, True, found)
    return Check(name, False, f"{found} in {folder}, {needed:g} needed", remedy)


def _where(error: BaseException) -> str:
    """The error with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({frames[-1].filename}:{frames[-1].lineno})"


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
