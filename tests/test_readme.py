"""The README names commands, modules and files that exist, and no number is left to fill in."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest

from conftest import ROOT

TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}


@pytest.mark.parametrize("name", TEXTS)
def test_commands_modules_and_files_exist(name: str) -> None:
    text = TEXTS[name]
    scripts = set(re.findall(r"training_scripts/\w+\.sh", text))
    modules = set(re.findall(r"python -m (parallel_r1[\w.]+)", text))
    files = set(re.findall(r"`((?:verl|tests|data_prep|configs)/[\w/.]+\.\w+)`", text))
    assert scripts and files
    assert [s for s in scripts if not os.access(ROOT / s, os.X_OK)] == []
    assert [m for m in modules if importlib.util.find_spec(m) is None] == []
    assert [f for f in files if not (ROOT / f).is_file()] == []


def test_the_two_commands_are_the_ones_that_ci_and_users_run() -> None:
    block = re.search(r"```bash\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1].split("\n")
    assert block[:2] == ["bash training_scripts/quickstart.sh", "bash training_scripts/test.sh"]
    assert "training_scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_entry_of_the_tree_exists() -> None:
    fenced = TEXTS["README.md"].split("```")[1::2]
    tree = next(block for block in fenced if "\ndata_prep/ " in block)
    package = ROOT / "verl" / "parallel_r1"
    for line in tree.strip().splitlines():
        entry = line.split()[0]
        assert ((package if line.startswith("  ") else ROOT) / entry).exists(), line


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in TEXTS["README.md"]
