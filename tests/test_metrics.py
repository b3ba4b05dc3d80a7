"""Numbers from evaluation samples, against values worked out by hand, by simulation and by SciPy."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from parallel_r1.evaluation import metrics as metrics_module
from parallel_r1.evaluation.metrics import Interval, bootstrap_mean, paired_gain, read_samples, summarise


def make_sample(index=0, sample=0, **changes):
    """A correct response with one block of two paths."""
    return {
        "index": index,
        "sample": sample,
        "prompt": "What is 12+34+5?",
        "response": "<Parallel><Path>a</Path><Path>b</Path></Parallel>\n<Summary>s</Summary>\nFinal Answer: 51",
        "ground_truth": "51",
        "correct": True,
        "grade": "ok",
        "has_block": True,
        "violations": [],
        "paths_per_block": [2],
        "tokens": 40,
        "critical_tokens": 30,
        "truncated": False,
        "forced_closers": 0,
        **changes,
    }


WRONG = {"correct": False, "grade": "wrong"}
UNPARSEABLE = {"correct": False, "grade": "unparseable"}
NO_BLOCK = {"has_block": False, "paths_per_block": []}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- bootstrap_mean


def test_interval_covers_the_truth_as_often_as_it_says():
    @cache  # the interval depends on the set of values alone, here on the number of ones
    def interval(ones, confidence):
        return bootstrap_mean([1.0] * ones + [0.0] * (200 - ones), confidence=confidence)

    ones = np.random.default_rng(1).binomial(200, 0.7, size=2000).tolist()

    def coverage(confidence):
        return np.mean([(i := interval(k, confidence)).low <= 0.7 <= i.high for k in ones])

    assert 0.93 <= coverage(0.95) <= 0.97
    assert not 0.93 <= coverage(0.85) <= 0.97  # the bounds tell a wrong interval from a right one


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(2).exponential(size=80)
    ours = bootstrap_mean(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=3).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.high - ours.low > 0.2  # so that the tolerance means something


def test_problems_are_resampled_not_responses():
    rng = np.random.default_rng(3)
    problems = rng.integers(0, 2, size=50).astype(float)
    values, groups = np.repeat(problems, 16), np.repeat(np.arange(50), 16)
    one_each, grouped, ungrouped = bootstrap_mean(problems), bootstrap_mean(values, groups), bootstrap_mean(values)
    assert grouped == one_each and grouped.n == 50
    assert ungrouped.n == 800
    assert ungrouped.high - ungrouped.low < (grouped.high - grouped.low) / 3  # 16 copies look like 16 times the data


def test_every_problem_weighs_the_same():
    assert bootstrap_mean([1, 1, 1, 0], [7, 7, 7, 9]).mean == 0.5


def test_order_does_not_matter_and_the_seed_does():
    values, groups = [1, 0, 1, 1, 0, 0.5], [0, 0, 1, 2, 3, 4]
    order = [3, 5, 0, 4, 1, 2]
    shuffled = bootstrap_mean([values[i] for i in order], [groups[i] for i in order], resamples=50)
    assert shuffled == bootstrap_mean(values, groups, resamples=50)
    assert shuffled != bootstrap_mean(values, groups, resamples=50, seed=1)


def test_memory_chunks_do_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(4).normal(size=30)
    whole = bootstrap_mean(values, resamples=1000)
    monkeypatch.setattr(metrics_module, "_DRAWS_PER_CHUNK", 64)
    pieces = bootstrap_mean(values, resamples=1000)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=0.1)


@pytest.mark.parametrize("values", [[0.3] * 7, [1.0], [0.0, 0.0]])
def test_without_variation_the_interval_is_the_point(values):
    assert bootstrap_mean(values) == Interval(values[0], values[0], values[0], len(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "at least one number"),
        ({"values": [1.0, float("nan")]}, r"values\[1\] is nan"),
        ({"values": [1.0, 0.0], "groups": [1]}, "2 values and 1 groups"),
        ({"values": [1.0], "confidence": 95}, "confidence=95"),
        ({"values": [1.0], "resamples": 0}, "resamples=0"),
    ],
)
def test_bootstrap_refuses_what_has_no_answer(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(**arguments)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_interval_lies_within_the_values(values):
    interval = bootstrap_mean(values, resamples=100)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack


def test_overlap():
    assert Interval(0.5, 0.4, 0.6, 9).overlaps(Interval(0.7, 0.6, 0.8, 9))
    assert not Interval(0.5, 0.4, 0.6, 9).overlaps(Interval(0.7, 0.61, 0.8, 9))
    assert not Interval(0.7, 0.61, 0.8, 9).overlaps(Interval(0.5, 0.4, 0.6, 9))


# --- summarise


def test_summary_of_four_responses_by_hand():
    samples = [
        make_sample(0, 0, paths_per_block=[2, 3], tokens=100, critical_tokens=60),
        make_sample(0, 1, **WRONG, violations=["unclosed <Path>"], tokens=50, critical_tokens=40, forced_closers=2),
        make_sample(1, 0, **NO_BLOCK, tokens=30, critical_tokens=30),
        make_sample(1, 1, **NO_BLOCK, **UNPARSEABLE, truncated=True, tokens=20, critical_tokens=20),
    ]
    summary = summarise(samples)
    assert summary.pop("accuracy") == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 2}  # both problems: 1 of 2
    assert summary == {
        "samples": 4,
        "valid_ratio": 3 / 4,
        "valid_block_ratio": 1 / 2,
        "parallel_ratio": 2 / 4,
        "mean_paths_per_block": 7 / 3,
        "tokens": 50.0,
        "critical_tokens": 37.5,
        "critical_share": 150 / 200,
        "truncated_ratio": 1 / 4,
        "forced_closers": 2,
        "grades": {"ok": 2, "wrong": 1, "unparseable": 1},
    }


def test_summary_without_blocks_or_tokens_has_none_and_no_nan():
    summary = summarise([make_sample(**NO_BLOCK, tokens=0, critical_tokens=0)])
    assert summary["valid_block_ratio"] is summary["mean_paths_per_block"] is summary["critical_share"] is None
    assert summary["parallel_ratio"] == 0
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 1}, "sample 2, 'correct': found 1, expected bool"),
        ({"tokens": True}, "'tokens': found True, expected int"),
        ({"grade": "right"}, "'grade': found 'right'"),
    ],
)
def test_summary_refuses_a_wrong_field(change, message):
    with pytest.raises(ValueError, match=message):
        summarise([make_sample(), make_sample(1, **change)])


def test_summary_refuses_a_missing_field_and_an_empty_list():
    sample = make_sample()
    del sample["critical_tokens"]
    with pytest.raises(ValueError, match="sample 1, 'critical_tokens': found nothing"):
        summarise([sample])
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


# --- paired_gain


def test_gain_by_hand():
    before = [make_sample(0), make_sample(1, **WRONG), make_sample(2, 0), make_sample(2, 1, **WRONG)]
    after = [make_sample(0), make_sample(1), make_sample(2, 0), make_sample(2, 1)]
    gain = paired_gain(before, after)
    assert gain.mean == 0.5 and gain.n == 3  # differences 0, 1, 0.5
    assert (gain.low, gain.high) == (0.0, 1.0)  # all-0 and all-1 draws: 1/27 each, more than 2.5%


def test_gain_is_paired():
    """Half of the problems hard, all a little easier afterwards: paired, the gain has no spread at all."""
    before = [make_sample(i, k, **({} if i % 2 and k else WRONG)) for i in range(20) for k in range(2)]
    after = [make_sample(i, k, **({} if i % 2 or k else WRONG)) for i in range(20) for k in range(2)]
    gain = paired_gain(before, after)
    assert (gain.low, gain.mean, gain.high) == (0.5, 0.5, 0.5)
    accuracy = summarise(after)["accuracy"]
    assert accuracy["high"] - accuracy["low"] > 0.1


def test_gain_does_not_depend_on_file_order():
    before = [make_sample(i, **(WRONG if i % 3 else {})) for i in range(30)]
    after = [make_sample(i, **(WRONG if i % 5 else {})) for i in range(30)]
    assert paired_gain(before, after[::-1]) == paired_gain(before, after)


def test_gain_refuses_other_problems():
    one, two = [make_sample(0), make_sample(1)], [make_sample(0), make_sample(2), make_sample(3)]
    with pytest.raises(ValueError, match=r"1 problems only in the first evaluation \(1\)"):
        paired_gain(one, two)
    with pytest.raises(ValueError, match=r"2 problems only in the second evaluation \(1, 2\)"):
        paired_gain([make_sample(0)], [make_sample(0), make_sample(1), make_sample(2)])
    with pytest.raises(ValueError, match="problem 1: '51' against '52'"):
        paired_gain(one, [make_sample(0), make_sample(1, ground_truth="52")])


# --- read_samples


def test_samples_survive_the_file(tmp_path):
    samples = [make_sample(0, 0), make_sample(0, 1, response="\x1b[31m\u2028 two\nlines")]
    assert read_samples(write_lines(tmp_path / "s.jsonl", samples)) == samples


def test_samples_cut_off_repeated_or_absent_are_refused(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", [make_sample(0), make_sample(1)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="line 2 is not JSON.*run it again"):
        read_samples(path)
    with pytest.raises(ValueError, match="problem 4, sample 0 more than once"):
        read_samples(write_lines(path, [make_sample(4), make_sample(4)]))
    with pytest.raises(ValueError, match="s.jsonl: found no samples"):
        read_samples(write_lines(path, []))
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "absent.jsonl")


def test_metrics_import_neither_torch_nor_matplotlib():
    code = "import sys, parallel_r1.evaluation.metrics; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'numpy'}"
