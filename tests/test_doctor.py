"""`parallel-r1 doctor`: each check finds what it is for, says what to do about it, and is quiet where all is well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel_r1 import doctor
from parallel_r1.doctor import GIB, Check

STRAY = "from parallel_r1 import doctor; check = doctor.check_stray_verl(); print(check.ok, check.found, check.remedy)"


def cli(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "parallel_r1.cli", *arguments]
    return subprocess.run(command, env=os.environ | variables, cwd=cwd, capture_output=True, text=True, timeout=280)


def children() -> set[str]:
    """Process ids of the living children of this process."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def make_root(folder: Path, *lock: str, alias: str = "packaging") -> Path:
    """A repository with these lines in its CPU lock, and an alias that is (by default) installed."""
    from importlib.metadata import version

    (folder / "requirements" / "vllm_alias").mkdir(parents=True)
    (folder / "requirements" / "cpu.txt").write_text("\n".join(["# how it was made", "", *lock]))
    project = f'[project]\nname = "{alias}"\nversion = "{version("packaging")}"\n'
    (folder / "requirements" / "vllm_alias" / "pyproject.toml").write_text(project)
    return folder


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 12, 9), True), ((3, 13, 0), False)]
)
def test_python_versions(version: tuple[int, ...], ok: bool) -> None:
    check = doctor.check_python(version)
    assert check.ok == ok and bool(check.remedy) != ok
    assert check.found == ".".join(map(str, version))


def test_every_version_that_differs_is_listed(tmp_path: Path) -> None:
    pytest_version = pytest.__version__
    root = make_root(
        tmp_path, f"pytest=={pytest_version}", "hypothesis==0.1", "not-there==1.0", alias="not-there-either"
    )
    check = doctor.check_versions("cpu", root)
    assert not check.ok and "install.sh" in check.remedy
    assert "hypothesis" in check.found and "wanted ==0.1" in check.found
    assert "not-there missing (wanted ==1.0)" in check.found and "not-there-either missing" in check.found
    assert "pytest" not in check.found.replace(str(tmp_path), "")


def test_versions_as_in_the_lock_pass(tmp_path: Path) -> None:
    check = doctor.check_versions("cpu", make_root(tmp_path, f"pytest=={pytest.__version__}"))
    assert check == Check("versions", True, "2 packages as in requirements/cpu.txt")


def test_a_local_build_of_another_torch_is_another_version(tmp_path: Path) -> None:
    """`==2.13.0+cpu` is not met by the CUDA build 2.13.0, while a GPU pin `==2.11.0` is met by 2.11.0+cu130."""
    (tmp_path / "site" / "torch-2.13.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    (tmp_path / "site" / "vllm-0.24.0+cu130.dist-info").mkdir()
    (tmp_path / "site" / "vllm-0.24.0+cu130.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.24.0+cu130\n")
    root = make_root(tmp_path, "torch==2.13.0+cpu", "vllm==0.24.0")
    code = "import sys; from pathlib import Path; from parallel_r1 import doctor"
    code += "; print(doctor.check_versions('cpu', Path(sys.argv[1])).found)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.check_output([sys.executable, "-c", code, str(root)], env=environment, text=True)
    assert "torch 2.13.0 (wanted ==2.13.0+cpu)" in found and "vllm" not in found.split("cpu.txt")[1]


def test_packages_that_break_the_cpu_stack_are_named(tmp_path: Path) -> None:
    info = tmp_path / "site" / "triton-3.6.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6.0\n")
    root = make_root(tmp_path, f"pytest=={pytest.__version__}")
    code = "import sys; from pathlib import Path; from parallel_r1 import doctor"
    code += "; check = doctor.check_versions('cpu', Path(sys.argv[1])); print(check.ok, check.found, check.remedy)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.check_output([sys.executable, "-c", code, str(root)], env=environment, text=True)
    assert found.startswith("False") and "triton 3.6.0 (must not be there)" in found
    assert "pip uninstall -y triton" in found


def test_a_missing_lock_file_is_said(tmp_path: Path) -> None:
    check = doctor.check_versions("cuda", tmp_path)
    assert not check.ok and str(tmp_path / "requirements" / "gpu.txt") in check.found and "checkout" in check.remedy


def test_the_lock_file_of_this_repository_is_found() -> None:
    assert "no lock file" not in doctor.check_versions("cpu").found


def stray(cwd: Path, **variables: str) -> str:
    environment = os.environ | variables
    return subprocess.check_output([sys.executable, "-c", STRAY], cwd=cwd, env=environment, text=True)


def test_a_stray_verl_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    assert stray(tmp_path).startswith("True"), "a folder without __init__.py hides nothing, as our own verl/"
    (tmp_path / "verl" / "__init__.py").touch()
    found = stray(tmp_path)
    assert found.startswith("False") and f"{tmp_path}/verl would be imported" in found and "delete or rename" in found


def test_a_stray_verl_in_the_repository_is_found_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    assert doctor.check_stray_verl(root=tmp_path).ok
    (tmp_path / "verl" / "__init__.py").touch()
    check = doctor.check_stray_verl(root=tmp_path)
    assert not check.ok and str(tmp_path / "verl") in check.found


def test_a_stray_verl_on_the_python_path_is_found(tmp_path: Path) -> None:
    (tmp_path / "clone" / "verl").mkdir(parents=True)
    (tmp_path / "clone" / "verl" / "__init__.py").touch()
    found = stray(tmp_path, PYTHONPATH=str(tmp_path / "clone"))
    assert found.startswith("False") and "clone/verl" in found and "PYTHONPATH" in found


def test_memory_counts_the_limit_of_the_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {9 * 2**20} kB\n")
    assert doctor.check_memory(8, meminfo, tmp_path) == Check("memory", True, "9.0 GiB available")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.check_memory(8, meminfo, tmp_path).ok
    (tmp_path / "memory.max").write_text(f"{10 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    check = doctor.check_memory(8, meminfo, tmp_path)
    assert not check.ok and check.found == "7.0 GiB available" and "8 GiB" in check.remedy


def test_space_in_shared_memory_and_on_disk(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(needed=0).ok and doctor.check_disk(tmp_path, needed=0).ok
    small = doctor.check_shared_memory(needed=1e9)
    assert not small.ok and "remount,size=" in small.remedy and "--shm-size" in small.remedy
    full = doctor.check_disk(tmp_path, needed=1e9)
    assert not full.ok and str(tmp_path) in full.found and "TMPDIR" in full.remedy
    assert not doctor.check_shared_memory(tmp_path / "none").ok


def test_device_names_the_cores_or_says_that_no_gpu_is_there() -> None:
    import torch

    cpu = doctor.check_device("cpu")
    assert cpu.ok and f"{len(os.sched_getaffinity(0))} cores" in cpu.found
    cuda = doctor.check_device("cuda")
    assert cuda.ok == torch.cuda.is_available()
    assert cuda.ok or ("no GPU" in cuda.found and "nvidia-smi" in cuda.remedy)


def test_report_prints_one_line_per_check_and_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Check("left", True, "fine"), Check("right", False, "broken", "mend it")
    assert doctor.report([good]) == 0
    assert capsys.readouterr().out == "ok    left: fine\nall 1 checks passed\n"
    assert doctor.report([good, bad]) == 1
    assert capsys.readouterr().out == "ok    left: fine\nFAIL  right: broken\n      -> mend it\n1 of 2 checks failed\n"
    assert doctor.report([good, bad], as_json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert printed["checks"][1] == {"name": "right", "ok": False, "found": "broken", "remedy": "mend it"}


def test_a_check_that_hangs_is_ended_and_reported() -> None:
    before, began = children(), time.monotonic()
    check = doctor.check_process("the driver", "driver", "cpu", deadline=0.3)
    assert not check.ok and check.found == "no answer within 0.3 s" and "try again" in check.remedy
    assert time.monotonic() - began < 30 and children() <= before


def test_a_process_that_dies_is_reported_with_its_last_line() -> None:
    check = doctor.check_process("no such probe", "nothing", "cpu")
    assert not check.ok and "KeyError: 'nothing'" in check.found and "see the whole output" in check.remedy


def test_help_is_fast_and_names_the_command() -> None:
    done = cli("--help")
    assert done.returncode == 0 and "doctor" in done.stdout
    code = "import sys, parallel_r1.cli, parallel_r1.doctor; print({'torch', 'verl', 'ray', 'vllm'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
    assert cli("doktor").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["driver", "ray", "vllm"])
def test_the_plug_in_is_loaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = children()
    check = doctor.check_process(kind, kind, doctor.torch_device())
    assert check.ok, check
    assert check.remedy == "" and children() <= before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variable"),
    [("driver", "VERL_USE_EXTERNAL_PLUGINS"), ("ray", "VERL_USE_EXTERNAL_PLUGINS"), ("vllm", "VLLM_PLUGINS")],
)
def test_a_plug_in_that_was_switched_off_is_reported(kind: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "none")
    check = doctor.check_process(kind, kind, doctor.torch_device())
    assert not check.ok and f"{variable}: none" in check.found and "'parallel_r1'" in check.found, check


BLOCK = """
import sys

class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {name!r}:
            raise ImportError("planted")

sys.meta_path.insert(0, Block)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("driver", "parallel_r1.plugin"),
        ("ray", "parallel_r1.plugin"),
        ("vllm", "parallel_r1.rollout.vllm_plugin"),
        ("driver", "ray"),
    ],
)
def test_a_plug_in_that_fails_to_import_shows_the_line(
    kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl and vLLM go on without it, and say nothing."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(name=module))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_process(kind, kind, doctor.torch_device())
    assert not check.ok and f"ImportError: planted ({tmp_path}/sitecustomize.py:8)" in check.found, check


@pytest.mark.slow
def test_exit_code_and_json_of_the_command(tmp_path: Path) -> None:
    done = cli("doctor", "--quick", "--json", cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert done.returncode == (0 if printed["ok"] else 1)
    names = [check["name"] for check in printed["checks"]]
    assert {"Python", "versions", "device", "memory", "verl plug-in in the driver"} <= set(names)
    assert not [name for name in names if "Ray" in name or "vLLM" in name]
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").touch()
    spoilt = cli("doctor", "--quick", cwd=tmp_path)
    assert spoilt.returncode == 1 and "FAIL  no other verl in the way" in spoilt.stdout
