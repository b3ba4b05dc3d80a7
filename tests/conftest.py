"""Shared fixtures: the tiny model and its data, made once per session by the project's own scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "data_prep" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small train, held-out and cold-start set."""
    out = tmp_path_factory.mktemp("arithmetic")
    run_script("arithmetic.py", "--out", out, "--train", 300, "--heldout", 60, "--seed", 7)
    return out


@pytest.fixture(scope="session")
def tiny_model(arithmetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny Qwen3 and its tokenizer, tags added."""
    out = tmp_path_factory.mktemp("tiny") / "model"
    run_script("tiny_model.py", "--corpus", arithmetic / "cold_start.parquet", "--out", out, "--seed", 7)
    return out
