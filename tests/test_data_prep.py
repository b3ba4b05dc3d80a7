"""Problems, traces, the tiny model and the dataset that SFT trains on."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from conftest import ROOT, run_script
from parallel_r1.format import parse
from parallel_r1.rewards import score
from parallel_r1.tags import TAGS, add_tags, tag_ids
from parallel_r1.training.sft_dataset import TraceDataset

sys.path.insert(0, str(ROOT / "data_prep"))
from arithmetic import check_disjoint
from scripted_teacher import by_place_value, step_by_step, write_trace


def test_train_and_heldout_share_no_problem(arithmetic: Path) -> None:
    terms = {}
    for name in ("train", "heldout"):
        frame = pd.read_parquet(arithmetic / f"{name}.parquet")
        questions = [prompt[0]["content"] for prompt in frame["prompt"]]
        terms[name] = {tuple(sorted(q.removeprefix("Calculate ").rstrip(".").split(" + "))) for q in questions}
        assert len(terms[name]) == len(frame)
        for question, gold in zip(questions, frame["reward_model"], strict=True):
            a, b = question.removeprefix("Calculate ").rstrip(".").split(" + ")
            assert int(a) + int(b) == int(gold["ground_truth"])
    assert not terms["train"] & terms["heldout"]


def test_a_shared_problem_is_found() -> None:
    with pytest.raises(ValueError, match="1 problems are in both sets"):
        check_disjoint([{"terms": (57, 68)}], [{"terms": (68, 57)}])


def test_same_seed_same_bytes(arithmetic: Path, tmp_path: Path) -> None:
    run_script("arithmetic.py", "--out", tmp_path, "--train", 300, "--heldout", 60, "--seed", 7)
    for name in ("train", "heldout", "cold_start"):
        assert (tmp_path / f"{name}.parquet").read_bytes() == (arithmetic / f"{name}.parquet").read_bytes()


def test_too_many_problems_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / "arithmetic.py"), "--out", str(tmp_path / "x")]
    done = subprocess.run([*command, "--train", "99999"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "distinct problems" in done.stderr and not (tmp_path / "x").exists()


def test_every_trace_passes_and_blocks_hold_two_different_routes() -> None:
    rng, orders, kinds = random.Random(0), set(), set()
    for _ in range(300):
        a, b = (rng.choice([n for n in range(11, 100) if n % 10]) for _ in range(2))
        trace = write_trace((a, b), rng)
        kinds.add(trace.kind)
        assert score("emphase_parallel", trace.text, str(a + b)).score == (1.2 if trace.kind == "parallel" else 1.0)
        if trace.kind == "parallel":
            assert parse(trace.text).paths_per_block == [2]
            first = trace.text.split("<Path>")[1].split("</Path>")[0]
            orders.add(first == step_by_step(a, b))
            assert {first, trace.text.split("<Path>")[2].split("</Path>")[0]} == {
                step_by_step(a, b),
                by_place_value(a, b),
            }
    assert kinds == {"parallel", "plain"} and orders == {True, False}  # either route comes first


def test_tags_have_rows_of_their_own(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = tag_ids(tokenizer)
    rows = model.get_input_embeddings().weight[list(ids)]
    assert torch.cdist(rows, rows).add(torch.eye(6)).min() > 1e-3
    assert tokenizer.decode(list(ids), skip_special_tokens=True) == "".join(TAGS)  # tags survive verl's decoding
    before = rows.clone()
    assert add_tags(model, tokenizer) == ids  # again changes nothing
    assert torch.equal(model.get_input_embeddings().weight[list(ids)], before)


def test_an_occupied_model_folder_is_refused(tiny_model: Path, arithmetic: Path) -> None:
    before = sorted(p.name for p in tiny_model.iterdir())
    command = [sys.executable, str(ROOT / "data_prep" / "tiny_model.py"), "--out", str(tiny_model)]
    command += ["--corpus", str(arithmetic / "cold_start.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "not empty" in done.stderr
    assert sorted(p.name for p in tiny_model.iterdir()) == before


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_the_loss_skips_the_prompt_and_what_the_rollout_inserts(arithmetic: Path, tokenizer) -> None:
    file = arithmetic / "cold_start.parquet"
    dataset = TraceDataset(str(file), tokenizer, OmegaConf.create({"max_length": 128}))
    assert len(dataset) == 300 and not dataset.dropped
    texts = pd.read_parquet(file)["response"]
    for row, text in zip((dataset[i] for i in range(40)), texts, strict=False):
        trained = row["input_ids"][row["loss_mask"] == 1]
        inserted_away = text.replace("<Path>", "").replace("</Parallel>\n<Summary>", "")
        assert tokenizer.decode(trained, skip_special_tokens=True) == inserted_away
        assert trained[-1] == tokenizer.eos_token_id


def test_long_rows_are_counted_not_cut(arithmetic: Path, tokenizer) -> None:
    file = str(arithmetic / "cold_start.parquet")
    whole = TraceDataset(file, tokenizer, OmegaConf.create({"max_length": 128}))
    lengths = np.array([len(whole[i]["input_ids"]) for i in range(len(whole))])
    limit = int(np.median(lengths))
    with pytest.warns(RuntimeWarning, match="longer than data.max_length"):
        part = TraceDataset(file, tokenizer, OmegaConf.create({"max_length": limit}))
    (too_long,) = part.dropped.values()
    assert too_long == (lengths > limit).sum() > 0 and len(part) + too_long == len(whole)
    with pytest.raises(ValueError, match="0 of 300 rows"), pytest.warns(RuntimeWarning):
        TraceDataset(file, tokenizer, OmegaConf.create({"max_length": 5}))


def test_a_file_without_the_columns_is_named(tmp_path: Path, tokenizer) -> None:
    pd.DataFrame({"question": ["?"]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="bad.parquet.*no column.*prompt"):
        TraceDataset(str(tmp_path / "bad.parquet"), tokenizer, OmegaConf.create({"max_length": 5}))
