"""The report of a run: response trees, training curves, and Markdown that hostile model output cannot break."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from parallel_r1.report import plots, replacing
from parallel_r1.report.plots import TrainingMetrics, load_training_metrics, plot_training, smooth
from parallel_r1.report.report import fence, headline, pick_rollouts, write_report
from parallel_r1.report.tree import render_tree
from parallel_r1.rewards.schedule import Phase

TAGS = ["<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>"]
JUNK = [
    "text",
    "\n",
    "  ",
    "<Path",
    "</ Path>",
    "<path>",
    "\x1b[31m",
    "\u202e",
    "\x00",
    "\ud800",
    "├─ ",
    "漢" * 90,
    "y" * 700,
]
HOSTILE = "x\n```\n</code></pre><script>alert(1)</script>\n``````\n# Heading\n<img src=x>\x1b[31m\n![a](b)"


def make_sample(index=0, sample=0, **changes):
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


def make_samples(right, total=40, **changes):
    """`total` problems with one response each, the first `right` of them correct."""
    wrong = {"correct": False, "grade": "wrong"}
    return [make_sample(i, **({} if i < right else wrong), **changes) for i in range(total)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def step(number, **data):
    return {"step": number, "data": {name.replace("__", "/"): value for name, value in data.items()}}


# --- render_tree


def test_tree_of_a_response():
    response = (
        "Let me add.\n\n<Parallel><Path>12+34=46, 46+5=51</Path><Path>34+5=39, 12+39=51</Path></Parallel>\n"
        "<Summary>Both routes give 51.</Summary>\nFinal Answer: 51"
    )
    assert render_tree(response).splitlines() == [
        "response",
        "├─ Trunk: Let me add.",
        "├─ Parallel (2 paths)",
        "│  ├─ Path 1: 12+34=46, 46+5=51",
        "│  └─ Path 2: 34+5=39, 12+39=51",
        "├─ Summary: Both routes give 51.",
        "└─ Trunk: Final Answer: 51",
    ]


def test_broken_tags_are_marked_where_they_are():
    response = "<Parallel>a<Path>b<Path>c<Parallel><Path>d</Path></Parallel>e</Path></Parallel></Summary><Summary>f"
    assert render_tree(response).splitlines() == [
        "response",
        "├─ Parallel (2 paths)",
        "│  ├─ ! Text, outside a path: a",
        "│  ├─ ! Path 1, not closed: b",
        "│  └─ Path 2: c",
        "│     ├─ ! Parallel (1 path), inside Path",
        "│     │  └─ Path 1: d",
        "│     └─ Text: e",
        "├─ ! Tag, closes nothing: </Summary>",
        "└─ ! Summary, not closed: f",
    ]


@pytest.mark.parametrize("blank", ["", " \n\t "])
def test_tree_of_nothing(blank):
    assert render_tree(blank) == "response (empty)"


def test_escape_sequences_are_shown_not_sent():
    shown = render_tree("red \x1b[31m\x07 \u202e bell\r\x9b2J \u2028")
    assert shown == "response\n└─ Trunk: red \\x1b[31m\\x07 \\u202e bell\\r\\x9b2J \\u2028"


def test_long_text_loses_its_middle_with_a_count():
    shown = render_tree("A" * 300 + "B" * 99_400 + "C" * 300)
    assert (shown.count("A"), shown.count("B"), shown.count("C")) == (300, 0, 300)
    assert "99,400 characters left out" in " ".join(shown.split())
    assert "left out" not in render_tree("A" * 600)


@pytest.mark.parametrize("piece", ["<Parallel>", "<Path>", "</Path>", "<Parallel><Path>", "<Path>x", "\n", "\x1b"])
def test_a_hundred_thousand_characters_stay_readable(piece):
    lines = render_tree(piece * (100_000 // len(piece))).split("\n")
    assert len(lines) <= 200 and max(map(len, lines)) <= 100
    if "<" in piece:
        assert any(re.search(r"[\d,]+ lines left out", line) for line in lines)


def test_nesting_is_drawn_five_deep():
    shown = render_tree("<Parallel>" * 8)
    assert shown.count("! Parallel (0 paths)") == 5
    assert shown.count("! Tag, nested too deep: <Parallel>") == 3


@settings(deadline=None)
@given(st.lists(st.sampled_from(TAGS) | st.sampled_from(JUNK) | st.text(), max_size=60), st.integers(40, 120))
def test_any_string_gives_a_plain_narrow_tree(pieces, width):
    shown = render_tree("".join(pieces), width=width)
    shown.encode("utf-8")
    lines = shown.split("\n")
    assert lines[0].startswith("response") and len(lines) <= 200
    assert all(line.isprintable() and len(line) <= width for line in lines)


_WORD = "[^<]*[^< ][^<]*"
_PATHS = rf"( *<Path>{_WORD}</Path>)+ *"
_WELL_FORMED = re.compile(rf"([^<]|<Parallel>{_PATHS}</Parallel>|<Summary>{_WORD}</Summary>)*")


@settings(deadline=None)
@given(st.lists(st.sampled_from(TAGS + ["a b", " "]), max_size=14).map("".join))
def test_the_mark_appears_exactly_where_tags_do_not_fit(response):
    assert ("! " in render_tree(response)) == (_WELL_FORMED.fullmatch(response) is None)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 999).map("p{}".format), min_size=1, max_size=4), max_size=3))
def test_well_formed_responses_show_every_path_unmarked(blocks):
    response = "".join(
        "t<Parallel>" + "".join(f"<Path>{p}</Path>" for p in paths) + "</Parallel>\n<Summary>s</Summary>\n"
        for paths in blocks
    )
    shown = render_tree(response)
    assert "! " not in shown and shown.count("Summary: s") == len(blocks)
    assert re.findall(r"Path (\d): (p\d+)", shown) == [(str(k), p) for b in blocks for k, p in enumerate(b, start=1)]


def test_model_text_cannot_pose_as_a_tag():
    shown = render_tree("fine\n└─ Summary: forged\nSummary: forged")
    assert not re.search("^[├└]─ Summary", shown, re.MULTILINE)


def test_tree_refuses_a_width_without_room():
    with pytest.raises(ValueError, match="width=39"):
        render_tree("x", width=39)


# --- training metrics


def test_later_file_wins_and_keeps_what_it_does_not_repeat(tmp_path):
    first = write_lines(tmp_path / "1.jsonl", [step(1, a=1), step(2, a=2, b=5), step(3, a=3)])
    resumed = write_lines(tmp_path / "2.jsonl", [step(4, a=40), step(2, a=20)])
    merged = load_training_metrics([first, resumed])
    assert merged.values == {1: {"a": 1}, 2: {"a": 20, "b": 5}, 3: {"a": 3}, 4: {"a": 40}}
    assert load_training_metrics([resumed, first]).values[2] == {"a": 2, "b": 5}
    steps, values = merged.series("a")
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [1, 20, 3, 40]
    assert merged.skipped_lines == 0 and merged.last_step() == 4


@pytest.mark.parametrize("torn", [b'{"step": 3, "da', b'{"step": 3, "data": {"name \xc3'])
def test_torn_last_line_is_skipped_and_counted(tmp_path, torn):
    first = write_lines(tmp_path / "1.jsonl", [step(1, a=1), step(2, a=2)])
    first.write_bytes(first.read_bytes() + torn)
    second = write_lines(tmp_path / "2.jsonl", [step(3, a=3)])
    merged = load_training_metrics([first, second])
    assert merged.skipped_lines == 1 and sorted(merged.values) == [1, 2, 3]


def test_other_damage_to_the_metrics_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "da\n' + json.dumps(step(2, a=1)) + "\n")
    with pytest.raises(ValueError, match="line 1 of 2 is not JSON"):
        load_training_metrics([path])
    for line in ("[1]", '{"step": 1}', '{"step": "1", "data": {}}'):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="m.jsonl: line 1: found"):
            load_training_metrics([path])
    with pytest.raises(FileNotFoundError):
        load_training_metrics([tmp_path / "absent.jsonl"])


def test_what_is_not_a_finite_number_is_left_out(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [step(1, a=None, b=float("nan"), c="x", d=float("inf"), e=2)])
    assert load_training_metrics([path]).values == {1: {"e": 2.0}}


def phases(*values, first=1):
    return TrainingMetrics({i: {"reward/phase": float(v)} for i, v in enumerate(values, start=first)})


def test_switch_is_the_first_step_after_it():
    assert phases(0, 0, 1, 2, 2, first=10).switch_step() == 13
    assert phases(2, 2).switch_step() == 1
    assert phases(0, 1, 0).switch_step() is None
    assert TrainingMetrics({3: {"reward/score": 2.0}}).switch_step() is None


def test_parallel_windows_are_runs_of_steps():
    assert phases(0, 1, 1, 0, 1, 2).parallel_windows() == [(2, 3), (5, 5)]
    gap = TrainingMetrics({1: {"reward/phase": 1.0}, 2: {"reward/phase": 1.0}, 4: {"reward/phase": 1.0}})
    assert gap.parallel_windows() == [(1, 2), (4, 4)]
    assert phases(0, 2).parallel_windows() == []


def test_smoothing_looks_back_over_steps():
    steps, values = np.array([1, 2, 3, 7]), np.array([1.0, 3.0, 8.0, 5.0])
    assert smooth(steps, values, window=2).tolist() == [1, 2, 5.5, 5]  # at 7 nothing else lies in the last two steps


# --- plots


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    return struct.unpack(">II", data[16:24])


def make_metrics(last=12, switch=9):
    return TrainingMetrics(
        {
            t: {
                "reward/score": t / 10,
                "reward/accuracy": t / 20,
                "parallel/ratio": 0.9,
                "reward/phase": float(Phase.ACCURACY_ONLY if t >= switch else Phase.PARALLEL if t in (4, 5) else 0),
            }
            for t in range(1, last + 1)
        }
    )


def test_every_plot_has_the_stated_size(tmp_path):
    written = plot_training(make_metrics(), tmp_path / "new" / "plots")
    assert [p.name for p in written] == [
        *("reward.png", "accuracy.png", "parallel_ratio.png", "position.png", "training.png")
    ]
    assert [png_size(p) for p in written] == [(1600, 900)] * 4 + [(1600, 1200)]
    assert sorted(p.name for p in (tmp_path / "new" / "plots").iterdir()) == sorted(p.name for p in written)


def test_plots_without_any_metric(tmp_path):
    assert [png_size(p) for p in plot_training(TrainingMetrics(), tmp_path)] == [(1600, 900)] * 4 + [(1600, 1200)]


def draw(panel, metrics):
    axes = Figure().subplots()
    plots._draw(axes, panel, metrics)
    return axes


def test_panel_marks_the_switch_and_the_parallel_windows():
    axes = draw(plots.PANELS[0], make_metrics(switch=9))
    raw, smoothed, switch = axes.lines
    assert raw.get_ydata().tolist() == [t / 10 for t in range(1, 13)]
    assert smoothed.get_ydata()[-1] == pytest.approx(np.mean([t / 10 for t in range(3, 13)]))
    assert list(switch.get_xdata()) == [8.5, 8.5]
    assert [text.get_text() for text in axes.texts] == ["accuracy only from step 9"]
    assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(3.5, 2.0)]
    assert axes.get_xlabel() == "training step" and axes.get_ylabel() == "mean reward"


def test_panel_without_data_says_so_and_without_switch_marks_none():
    missing = draw(plots.PANELS[3], make_metrics())
    assert not missing.lines and "no data" in missing.texts[0].get_text()
    unswitched = draw(plots.PANELS[0], make_metrics(switch=99))
    assert len(unswitched.lines) == 2 and not unswitched.texts


def test_plots_leave_no_global_state():
    code = "import sys, parallel_r1.report.report; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- report


@pytest.fixture
def make_report(tmp_path):
    def make(before, after, metrics=(), **changes):
        arguments = {
            "sft_samples": write_lines(tmp_path / "sft.jsonl", before),
            "rl_samples": write_lines(tmp_path / "rl.jsonl", after),
            "metrics": list(metrics),
            "seconds": {"sft": 61.25, "rl": 100.5},
            "run": {"seed": 0},
        }
        out = tmp_path / "report"
        report = write_report(out, **{**arguments, **changes})
        return out, report, (out / "report.md").read_text(encoding="utf-8")

    return make


def tokens(markdown):
    """Block and inline tokens of an independent Markdown parser."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        found += [token, *(token.children or [])]
    return found


def test_report_by_hand(make_report, tmp_path):
    metrics = write_lines(
        tmp_path / "m.jsonl",
        [
            step(1, reward__phase=0, mismatch__path_max=1e-5),
            step(2, reward__phase=2, mismatch__path_max=3e-5),
            step(3, reward__phase=2, mismatch__path_max=2e-5),
        ],
    )
    out, report, text = make_report(make_samples(10), make_samples(30), [metrics])
    assert json.loads((out / "report.json").read_text()) == report
    assert list(report) == ["sft", "rl", "gain", "training", "seconds", "run"]
    assert report["sft"]["accuracy"]["mean"] == 0.25 and report["rl"]["accuracy"]["mean"] == 0.75
    assert report["gain"]["mean"] == 0.5 and report["gain"]["intervals_overlap"] is False
    assert 0.3 < report["gain"]["low"] < 0.4 < 0.6 < report["gain"]["high"] < 0.7
    assert report["training"] == {
        "steps": 3,
        "switch_step": 2,
        "mismatch": {"trunk": None, "path": 3e-5, "summary": None, "after": None},
        "skipped_lines": 0,
    }
    assert "RL raised accuracy on 40 held-out problems: 25.0% before, 75.0% after" in text
    assert "| RL | 75.0% [" in text and "| 100.0% | 100.0% | 2.00 | 40.0 | 30.0 | 75.0% |" in text
    assert "| total | 161.8 |" in text and "step 2" in text and "trunk none logged, path 3e-05 nats" in text
    images = [token.attrs["src"] for token in tokens(text) if token.type == "image"]
    assert images == ["plots/training.png"] and png_size(out / images[0]) == (1600, 1200)
    links = [token.attrs["href"] for token in tokens(text) if token.type == "link_open"]
    assert len(links) == 4 and all((out / link).is_file() for link in links)
    assert sum(token.type == "th_open" for token in tokens(text)) == 8 + 2
    assert not list(Path(out).rglob("*.tmp"))


def test_report_without_metrics_is_json_without_nan(make_report):
    numbers = {
        "a": float("nan"),
        "b": np.float32(0.5),
        "c": [np.int64(3), float("inf")],
        "d": Path("x"),
        "e": {1: None},
    }
    out, report, text = make_report(
        make_samples(3, 4), make_samples(3, 4), run=numbers, seconds={"sft": float("nan"), "a|b <i>": 1}
    )
    assert report["run"] == {"a": None, "b": 0.5, "c": [3, None], "d": "x", "e": {"1": None}}
    assert report["training"]["steps"] is report["training"]["switch_step"] is None
    json.dumps(report, allow_nan=False)
    json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert "NaN" not in text
    assert "a|b <i>" in [token.content for token in tokens(text) if token.type == "text"]
    assert not [t for t in tokens(text) if t.type.startswith("html")]


def test_torn_metrics_are_reported(make_report, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(step(1, reward__score=0.5)) + '\n{"step": 2, "d')
    _, report, text = make_report(make_samples(1), make_samples(1), [path])
    assert report["training"]["skipped_lines"] == 1 and "Torn lines left out" in text


def test_report_refuses_different_problems_and_writes_nothing(make_report, tmp_path):
    with pytest.raises(ValueError, match=r"1 problems only in the second evaluation \(40\)"):
        make_report(make_samples(10, 40), make_samples(10, 41))
    assert not (tmp_path / "report").exists()


def result(low, mean, high, *, overlap=False, n=200, valid=0.99):
    row = {"accuracy": {"mean": 0.5}, "valid_ratio": valid}
    gain = {"low": low, "mean": mean, "high": high, "n": n, "intervals_overlap": overlap}
    return headline({"sft": {**row, "valid_ratio": 0.99}, "rl": row, "gain": gain})


def test_headline_says_what_happened():
    clean = result(0.05, 0.1, 0.15)
    assert clean.startswith("RL raised accuracy on 200 held-out problems") and ";" not in clean
    assert "+10.0 points (95% interval +5.0 to +15.0)" in clean
    assert result(-0.15, -0.1, -0.05).startswith("RL lowered accuracy")
    assert result(-0.01, 0.02, 0.05).startswith("RL did not measurably improve accuracy")
    assert "the interval of the gain includes zero" in result(-0.01, 0.02, 0.05)
    assert result(-0.05, 0.0, 0.05).startswith("RL did not improve accuracy")
    assert result(1e-17, 0.02, 0.05).startswith("RL did not measurably improve accuracy")  # rounding is no gain
    assert "the two accuracy intervals overlap" in result(0.01, 0.03, 0.05, overlap=True)
    assert "only 89.0% of the RL responses have a valid format" in result(0.05, 0.1, 0.15, valid=0.89)
    assert "valid format" not in result(0.05, 0.1, 0.15, valid=0.9)
    assert "12 problems are too few" in result(0.05, 0.1, 0.15, n=12)


def test_rollouts_are_picked_by_kind_and_seed():
    samples = make_samples(20) + [make_sample(50, has_block=False, paths_per_block=[])]
    picked = pick_rollouts(samples)
    names, chosen = [name for name, _ in picked], [sample for _, sample in picked]
    assert names == ["correct, with a block", "incorrect", "one more"]
    assert chosen[0]["correct"] and chosen[0]["has_block"] and not chosen[1]["correct"]
    assert len({s["index"] for s in chosen}) == 3
    assert pick_rollouts(samples[::-1]) == picked
    assert any(pick_rollouts(samples, seed) != picked for seed in range(1, 5))
    assert [s and s["index"] for _, s in pick_rollouts([make_sample(7)])] == [7, None, None]


def test_hostile_model_output_stays_inside_its_fence(make_report):
    hostile = {"response": HOSTILE, "prompt": HOSTILE, "ground_truth": HOSTILE}
    _, _, text = make_report(make_samples(10, **hostile), make_samples(20, **hostile), run={"note": HOSTILE})
    found = tokens(text)
    fences = [token for token in found if token.type == "fence"]
    assert [token.info for token in fences] == ["text", "text", "text", "json"]
    assert all("<script>" in token.content for token in fences)
    assert not [token for token in found if token.type.startswith("html")]
    assert "<script>" not in "".join(t.content for t in found if t.type in ("text", "inline", "code_inline"))
    assert [t.markup for t in found if t.type == "heading_open"] == ["#", "##", "##", "##", "##", *["###"] * 3, "##"]
    assert "\x1b" not in text
    headings = re.findall("^### .*", text, re.MULTILINE)
    assert re.fullmatch(r"### Incorrect: problem \d+, sample 0, grade wrong", headings[1])


_FENCE_PIECES = st.sampled_from(["```", "````", "\n```\n", "\n````text\n", "`", "~~~", "\n", " ", "a", "> ", "# "])


def parse_blocks(markdown):
    return [(token.type, token.content) for token in MarkdownIt("commonmark").parse(markdown)]


@settings(deadline=None)
@given(st.lists(_FENCE_PIECES, max_size=12).map("".join))
def test_nothing_ends_a_fence_from_inside(content):
    assert parse_blocks(fence(content)) == [("fence", content + "\n")]


def test_a_fence_of_fixed_length_would_be_ended():
    """Negative control: the parser above does notice a broken fence."""
    content = "a\n```\n# b"
    assert parse_blocks(fence(content)) == [("fence", content + "\n")]
    assert parse_blocks(f"```text\n{content}\n```") != [("fence", content + "\n")]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
