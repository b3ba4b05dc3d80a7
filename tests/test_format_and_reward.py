"""Format check, grading, reward phases and their schedule."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pandas as pd
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from parallel_r1.config import ParallelConfig, RewardConfig
from parallel_r1.format import check, parse
from parallel_r1.rewards import recipes, score
from parallel_r1.rewards.grading import reference, robust, to_number
from parallel_r1.rewards.math_pool import Comparer
from parallel_r1.rewards.schedule import Phase, scheduled
from parallel_r1.tags import TAGS
from parallel_r1.training.gold import check as check_gold
from parallel_r1.training.gold import find_problems

GOOD = "Try.\n<Parallel><Path>1+2=3</Path><Path>2+1=3</Path></Parallel>\n<Summary>3</Summary>\nFinal Answer: 3"


def test_valid_texts() -> None:
    assert check(GOOD) == [] and check("Final Answer: 3") == [] and check("") == []
    assert check(GOOD + "\n" + GOOD) == []
    assert parse(GOOD).paths_per_block == [2] and parse(GOOD).trunk_after == "\nFinal Answer: 3"


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        (GOOD.replace("</Summary>", ""), "unclosed <Summary>"),
        (GOOD.replace("<Summary>3</Summary>", ""), "block without <Summary>"),
        (GOOD.replace("</Parallel>", ""), "unexpected <Summary> in block"),
        (GOOD.replace("<Path>2+1=3</Path>", ""), "block with 1 path(s)"),
        (GOOD.replace("2+1=3", " "), "empty path"),
        (GOOD.replace("</Path><Path>", "</Path>and<Path>"), "text before <Path>"),
        (GOOD.replace("</Parallel>\n", "</Parallel>so "), "text before <Summary>"),
        (GOOD.replace("1+2", "<Parallel>1+2"), "unexpected <Parallel> in path"),
        (GOOD + "</Summary>", "unexpected </Summary> in trunk"),
        (GOOD + "<Parallel>", "unclosed <Parallel>"),
        (GOOD.replace("<Summary>3<", "<Summary><"), "empty summary"),
    ],
)
def test_violations_are_named_with_their_place(text: str, violation: str) -> None:
    found = check(text)
    assert found and found[0].startswith(violation) and "at character" in found[0]


@given(st.lists(st.one_of(st.sampled_from(TAGS), st.text(max_size=3)), max_size=30).map("".join))
def test_format_is_total(text: str) -> None:
    result = parse(text)
    assert all(0 <= int(v.rsplit(" ", 1)[1]) <= len(text) for v in result.violations)


@pytest.mark.parametrize("rule", ["reference", "algorithm1"])
def test_other_rules(rule: str) -> None:
    assert check(GOOD, rule) == [] and check("", rule) == []
    assert check(GOOD.replace("</Parallel>", ""), rule) and check(GOOD + "</Parallel>", rule)
    assert "at character" in check(GOOD + "<Parallel>", rule)[0]
    with pytest.raises(ValueError, match="unknown format rule 'loose'"):
        check(GOOD, "loose")


def test_what_the_reference_rule_overlooks() -> None:
    for text in (
        GOOD.replace("</Summary>", ""),
        GOOD + "</Summary>",
        GOOD.replace("1+2=3", ""),
        GOOD.replace("</Path><Path>", "</Path>and<Path>"),
    ):
        assert check(text) and not check(text, "reference")
    assert check(GOOD.replace("<Path>2+1=3</Path>", ""), "reference")  # one path


@given(st.lists(st.one_of(st.sampled_from(TAGS), st.text(max_size=3)), max_size=30).map("".join))
def test_all_rules_are_total(text: str) -> None:
    for rule in ("strict", "reference", "algorithm1"):
        check(text, rule)


def golden(name: str) -> pd.DataFrame:
    folder = os.environ.get("PARALLEL_R1_DATA")
    if not folder:
        pytest.skip(f"PARALLEL_R1_DATA is not set: no folder with golden/{name}.parquet")
    return pd.read_parquet(Path(folder) / "golden" / f"{name}.parquet")


def test_format_rules_equal_the_golden_answers() -> None:
    rows = golden("format")
    assert len(rows) == 500 and 0.2 < rows.reference_valid.mean() < 0.9
    for row in rows.itertuples():
        assert (not check(row.text, "reference")) == row.reference_valid
        assert (not check(row.text, "algorithm1")) == row.algorithm1_valid


PUBLISHED = {
    "math_dapo": "accuracy",
    "math_dapo_acc_parallel_interved": "accuracy_parallel_interv",
    "math_dapo_accuracy_add_parallel": "accuracy_add_parallel",
    "math_dapo_accuracy_parallel": "accuracy_parallel",
    "math_dapo_accuracy_times_parallel": "accuracy_times_parallel",
    "math_dapo_emphase_acc": "emphase_acc",
    "math_dapo_emphase_parallel": "emphase_parallel",
    "math_dapo_emphase_parallel_enhance": "emphase_parallel_enhance",
    "math_dapo_emphase_parallel_add_diversity": "emphase_parallel_add_diversity",
    "math_dapo_accuracy_add_diversity": "accuracy_add_diversity",
    "math_dapo_accuracy_add_parallel_add_diversity": "accuracy_add_parallel_add_diversity",
    "math_dapo_efficiency": "accuracy_add_efficiency",
    "math_dapo_efficiency_decay": "accuracy_add_efficiency_reward_decay",
    "gsm8k_accuracy_add_parallel": "gsm8k/accuracy_add_parallel",
    "gsm8k_add_special_token_reward": "gsm8k/accuracy_times_special_token",
    "gsm8k_emphase_acc": "gsm8k/emphase_acc",
    "gsm8k_emphase_parallel": "gsm8k/emphase_parallel",
}


@pytest.mark.parametrize("column", PUBLISHED)
def test_recipes_equal_the_golden_answers(column: str) -> None:
    rows = golden("rewards")
    assert len(rows) == 150 and set(rows.columns[3:]) == set(PUBLISHED)
    for row, expected in zip(rows.itertuples(), rows[column], strict=True):
        found = score(PUBLISHED[column], row.response, row.ground_truth, row.global_step, grader="reference")
        assert found.score == pytest.approx(expected, abs=1e-9)
        assert found.score == sum(found.terms.values())


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        ("51", "51", "ok"),
        ("51.", "51", "ok"),
        ("51.0", "51", "ok"),
        ("1,051", "1051", "ok"),
        ("1{,}051", "1051", "ok"),
        ("**51**", "51", "ok"),
        ("$51$", "51", "ok"),
        ("\\$51", "51", "ok"),
        ("51 dollars", "51", "ok"),
        ("51\\text{ cm}", "51", "ok"),
        ("90^\\circ", "90", "ok"),
        ("1/2", "0.5", "ok"),
        ("\\frac{1}{2}", "0.5", "ok"),
        ("\\boxed{70}", "70", "ok"),
        ("\\sqrt{8}", "2\\sqrt{2}", "ok"),
        ("x^2+2x+1", "(x+1)^2", "ok"),
        ("(3,4)", "(3, 4)", "ok"),
        ("\\text{Evelyn}", "Evelyn", "ok"),
        ("(4,3)", "(3,4)", "wrong"),
        ("[0,1]", "[0,1)", "wrong"),
        ("0.3333", "1/3", "wrong"),
        ("\\frac{2}{1}", "\\frac{1}{2}", "wrong"),
        ("52", "51", "wrong"),
        ("-51", "51", "wrong"),
        ("1/0", "51", "wrong"),
        ("", "51", "unparseable"),
        ("9" * 100_000, "51", "unparseable"),
    ],
)
def test_robust_grading(answer: str, gold: str, status: str) -> None:
    assert robust(f"so\nFinal Answer: {answer}\n", gold).status == status


def test_robust_grading_on_hand_checked_pairs() -> None:
    lines = (Path(__file__).parent / "grading_pairs.txt").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line and not line.startswith("#")]
    wrong = [row for row in rows if robust(f"so\nFinal Answer: {row[0]}", row[1]).correct != (row[2] == "1")]
    assert len(rows) >= 200 and 0.3 < sum(row[2] == "1" for row in rows) / len(rows) < 0.8
    assert len(wrong) <= 0.01 * len(rows), wrong


def test_where_an_answer_is_read() -> None:
    assert robust("Final Answer: 1\nFinal Answer: 2", "2").correct
    assert robust("The answer is 2.", "2").correct and robust("so \\boxed{2}.", "2").correct
    assert robust("well\n\n2", "2").correct
    assert robust("I think 2 or so", "2").status == "unparseable"
    assert to_number("1,23") is None and to_number("\\frac{3}{4}") == Fraction(3, 4)
    inside = GOOD.replace("1+2=3", "Final Answer: 3").replace("\nFinal Answer: 3", "\n")
    assert robust(inside, "3").status == "unparseable"  # in a path it does not count
    assert not reference("Final Answer: 70.", "70").correct and not reference("\\boxed{70}", "70").correct
    with pytest.raises(ValueError, match="unknown form"):
        reference("x", "1", form="other")


@pytest.fixture
def pool() -> Iterator[Comparer]:
    comparer = Comparer(workers=1, deadline=1.5)
    yield comparer
    comparer.close()


HOSTILE = ["9^{9^{9^{9}}}", "10!!!!!!!", "{" * 3000, "\\frac{" * 300, "\x00\x01\x1b[31m", "1" * 100_000, "("]
HOSTILE += ["__import__('os').system('touch PWNED')", "\\input{/etc/passwd}", "x" * 1_000_000]


def test_hostile_answers_cost_their_deadline_and_nothing_else(
    pool: Comparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pool.compare("\\frac{1}{2}", "0.5") == "ok"
    statuses = set()
    for answer in HOSTILE:
        start = time.monotonic()
        statuses.add(status := pool.compare(answer[:5000], "5"))
        assert time.monotonic() - start < 2.5 and status != "ok", answer[:20]
        assert pool.compare("\\frac{10}{2}", "5") == "ok"  # the next answer finds a worker that works
    assert "timeout" in statuses and not list(tmp_path.iterdir())


def test_memory_of_an_answer_is_bounded() -> None:
    small = Comparer(workers=1, deadline=20, memory=64 * 2**20)
    try:
        assert small.compare("2^{10}", "1024") == "ok"
        assert small.compare("123456789^{12345678}", "5") in ("error", "wrong", "timeout")
        process = psutil.Process(small._idle.get().process.pid)
        assert process.memory_info().rss < 2**30
    finally:
        process.kill()


def test_gold_answers_are_checked_against_themselves(tmp_path: Path) -> None:
    good = ["1", "\\frac{1}{2}", "(3,4)", "Evelyn", "x^2", "\\{1,2\\}"]
    assert find_problems(good, "robust") == {} == find_problems(["1", "2"], "reference")
    cut = "\\frac{\\sqrt{3"
    assert "may have been cut" in find_problems([*good, cut], "robust")[cut]

    path = tmp_path / "train.parquet"
    pd.DataFrame({"reward_model": [{"ground_truth": gold} for gold in [*good, cut]]}).to_parquet(path)
    config = OmegaConf.create({"data": {"train_files": str(path), "val_files": [str(path)]}})
    with pytest.raises(ValueError, match="1 of 7 gold answers cannot be graded"):
        check_gold(config, "robust")
    pd.DataFrame({"reward_model": [{"ground_truth": ""}]}).to_parquet(path)
    with pytest.raises(ValueError, match="has no reward_model.ground_truth"):
        check_gold(config, "robust")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gold_answers_of_math_grade_as_correct_and_cut_ones_are_found() -> None:
    folder = os.environ.get("PARALLEL_R1_DATA")
    if not folder:
        pytest.skip("PARALLEL_R1_DATA is not set: no folder with math_test.parquet")
    golds = pd.read_parquet(Path(folder) / "math_test.parquet").answer.tolist()
    problems = find_problems(golds, "robust")
    assert 0 < sum(gold in problems for gold in golds) < 0.02 * len(golds)
    assert all(gold.count("{") != gold.count("}") for gold in problems)
    whole = [gold for gold in dict.fromkeys(golds) if gold not in problems]
    right = sum(robust(f"Final Answer: {gold}", gold).correct for gold in whole)
    assert right >= 0.99 * len(whole)


# ---- recipes and their schedule


def test_s2_pays_what_the_paper_says() -> None:
    plain, wrong, malformed = "Final Answer: 3", GOOD.replace("Answer: 3", "Answer: 4"), GOOD.replace("2+1=3", "")
    for step, expected in ((1, (1.0, 1.0, -1.0, 1.0)), (8, (1.0, 1.0, -1.0, 1.0)), (9, (1.2, 1.0, -1.0, -1.0))):
        found = [score("accuracy_parallel_interv", text, "3", step) for text in (GOOD, plain, wrong, malformed)]
        assert tuple(result.score for result in found) == expected
        assert found[0].recipe == ("accuracy" if step < 9 else "emphase_parallel")


def test_schedule_over_a_hundred_steps_and_from_its_middle() -> None:
    config = RewardConfig(switch_step=61)
    whole = [scheduled(step, config) for step in range(1, 101)]
    window = [("accuracy", Phase.ACCURACY)] * 8 + [("emphase_parallel", Phase.PARALLEL)] * 2
    assert whole == window * 6 + [("accuracy", Phase.ACCURACY_ONLY)] * 40
    assert [scheduled(step, config) for step in range(47, 101)] == whole[46:]  # resumed after step 46
    assert {scheduled(step, RewardConfig(recipe="accuracy"))[1] for step in range(1, 30)} == {Phase.ACCURACY}


def test_decay_is_a_function_of_the_step() -> None:
    name, text = "accuracy_add_efficiency_reward_decay", GOOD
    first, later = (score(name, text, "3", step).terms["efficiency"] for step in (1, 51))
    assert later == pytest.approx(first * math.exp(-1))


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_loads_and_pays(name: str) -> None:
    for text in (GOOD, "Final Answer: 3", "", GOOD.replace("</Path>", "")):
        for step in (1, 9):
            assert math.isfinite(score(name, text, "3", step).score)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cases: [{ if: [corect], pay: 1 }, { pay: 0 }]", "cases.0.if.0"),
        ("cases: [{ if: [correct], pay: 1 }]", "last case must have no condition"),
        ("base: nothing", "unknown reward recipe 'nothing' (named by mine)"),
        ("base: mine", "in a circle: mine -> mine"),
        ("base: accuracy\nadd: [{ name: x, of: lenght }]", "add.0.of"),
        ("base: accuracy\nbonus: 1", "bonus"),
        ("alternate: [{ steps: -1, recipe: accuracy }]", "alternate.0.steps"),
        ("{}", "has none"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_clear_error(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recipes.FOLDER, tmp_path / "rewards")
    (tmp_path / "rewards" / "mine.yaml").write_text(content)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "rewards")
    recipes.load.cache_clear()
    with pytest.raises(recipes.RecipeError) as error:
        recipes.load("mine")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_new_recipe_needs_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(recipes.FOLDER, tmp_path / "rewards")
    text = "base: emphase_parallel\nadd: [{ name: short, if: [correct], of: words, times: -0.01 }]"
    (tmp_path / "rewards" / "mine.yaml").write_text(text)
    (tmp_path / "rewards" / "late.yaml").write_text(
        "alternate: [{ steps: 1, recipe: mine }, { steps: 2, recipe: accuracy }]\noffset: 1"
    )
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "rewards")
    recipes.load.cache_clear()
    assert score("mine", "Final Answer: 3", "3").terms == {"case": 1.0, "short": pytest.approx(-0.03)}
    assert [recipes.in_force("late", step) for step in range(1, 6)] == [
        "accuracy",
        "mine",
        "accuracy",
        "accuracy",
        "mine",
    ]


def test_misuse_is_refused() -> None:
    with pytest.raises(recipes.RecipeError, match="unknown reward recipe 'acuracy'; there are accuracy,"):
        score("acuracy", GOOD, "3")
    with pytest.raises(ValueError, match="unknown grader"):
        score("accuracy", GOOD, "3", grader="kind")
    with pytest.raises(ValueError, match="nothing to grade against"):
        score("accuracy", GOOD, " ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": {"switch_step": -1}}, "switch_step is -1"),
        ({"reward": {"recipee": "x"}}, "unknown key parallel_r1.reward.recipee"),
        ({"reward": {"switch_step": "ten"}}, "valid integer"),
        ({"reward": {"max_ungraded": 2.0}}, "at most 1"),
        ({"rollout": {"num_paths": 0}}, "num_paths is 0"),
        ({"rolout": {}}, "unknown key parallel_r1.rolout"),
    ],
)
def test_configuration_errors_name_the_key(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig.from_mapping(values)
