"""Format check, grading, reward phases and their schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_r1.config import ParallelConfig, RewardConfig
from parallel_r1.format import check, parse
from parallel_r1.rewards.grading import grade, to_number
from parallel_r1.rewards.reward import score
from parallel_r1.rewards.schedule import Phase, phase
from parallel_r1.tags import TAGS

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


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        ("51", "51", "ok"),
        ("51.", "51", "ok"),
        ("51.0", "51", "ok"),
        ("1,051", "1051", "ok"),
        ("**51**", "51", "ok"),
        ("1/2", "0.5", "ok"),
        ("52", "51", "wrong"),
        ("-51", "51", "wrong"),
        ("5 1", "51", "unparseable"),
        ("1/0", "51", "unparseable"),
        ("", "51", "unparseable"),
        ("9^9^9^9", "51", "unparseable"),
        ("9" * 100_000, "51", "unparseable"),
        ("__import__('os')", "51", "unparseable"),
    ],
)
def test_grading(answer: str, gold: str, status: str) -> None:
    assert grade(f"so\nFinal Answer: {answer}\n", gold).status == status


def test_last_answer_counts_and_missing_answer_is_unparseable() -> None:
    assert grade("Final Answer: 1\nFinal Answer: 2", "2").correct
    assert grade("I think 2", "2").status == "unparseable"
    with pytest.raises(ValueError, match="not a number"):
        grade("Final Answer: 2", "two")
    assert to_number("1,23") is None


def test_rewards_of_both_phases() -> None:
    plain, wrong, malformed = "Final Answer: 3", GOOD.replace("Answer: 3", "Answer: 4"), GOOD.replace("2+1=3", "")
    scores = {
        Phase.ACCURACY: (1.0, 1.0, -1.0, 1.0),
        Phase.PARALLEL: (1.2, 1.0, -1.0, -1.0),
        Phase.ACCURACY_ONLY: (1.0, 1.0, -1.0, 1.0),
    }
    for in_force, expected in scores.items():
        assert tuple(score(text, "3", in_force).score for text in (GOOD, plain, wrong, malformed)) == expected


def test_an_answer_inside_a_path_does_not_count() -> None:
    text = GOOD.replace("1+2=3", "Final Answer: 3").replace("\nFinal Answer: 3", "\n")
    assert score(text, "3", Phase.ACCURACY).grade.status == "unparseable"


def test_schedule_alternates_and_switches_for_good() -> None:
    config = RewardConfig(switch_step=21)
    phases = [phase(step, config) for step in range(1, 31)]
    window = [Phase.ACCURACY] * 8 + [Phase.PARALLEL] * 2
    assert phases == window + window + [Phase.ACCURACY_ONLY] * 10
    # a pure function of the step: a run resumed at step 15 sees what an uninterrupted one sees
    assert [phase(step, config) for step in range(15, 31)] == phases[14:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": {"window": -1}}, "window is -1"),
        ({"reward": {"windw": 3}}, "unknown key parallel_r1.reward.windw"),
        ({"reward": {"window": "ten"}}, "valid integer"),
        ({"reward": {"window": 4, "accuracy_steps": 5}}, "more than the window"),
        ({"rollout": {"num_paths": 0}}, "num_paths is 0"),
        ({"rolout": {}}, "unknown key parallel_r1.rolout"),
    ],
)
def test_configuration_errors_name_the_key(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig.from_mapping(values)
