"""Training curves: reward, accuracy, parallel ratio and position of the blocks over the steps of a run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from parallel_r1.report import replacing
from parallel_r1.rewards.schedule import Phase

PHASE = "reward/phase"
SMOOTHING = 10  # steps: one S2 period, so the windows of the two rewards average out
OVERVIEW = "training.png"
SIZE, OVERVIEW_SIZE, DPI = (8.0, 4.5), (8.0, 6.0), 200  # inches: text stays readable at 800 pixels wide


@dataclass(frozen=True)
class _Panel:
    metric: str
    file: str
    title: str
    label: str
    share: bool  # lies in [0, 1], and the axis shows all of it


PANELS = (
    _Panel("reward/score", "reward.png", "Reward", "mean reward", False),
    _Panel("reward/accuracy", "accuracy.png", "Accuracy", "share of rollouts correct", True),
    _Panel("parallel/ratio", "parallel_ratio.png", "Parallel ratio", "share of rollouts with a block", True),
    _Panel("parallel/position", "position.png", "Position of parallel blocks", "position / response length", True),
)

# Okabe and Ito's palette: told apart with every common form of colour blindness.
_RAW, _SMOOTH, _SWITCH, _WINDOW = "#56B4E9", "#0072B2", "#D55E00", "#F0E442"
_WINDOW_ALPHA = 0.35


@dataclass
class TrainingMetrics:
    """Finite numbers logged per step, and how many torn lines were left out."""

    values: dict[int, dict[str, float]] = field(default_factory=dict)
    skipped_lines: int = 0

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(points,) rising steps at which `name` was logged, and (points,) its values; empty where it never was."""
        steps = sorted(step for step, data in self.values.items() if name in data)
        return np.array(steps, dtype=np.int64), np.array([self.values[s][name] for s in steps], dtype=np.float64)

    def last_step(self) -> int | None:
        return max(self.values, default=None)

    def switch_step(self) -> int | None:
        """First step rewarded for accuracy alone after the mid-training switch; None: no switch so far."""
        steps, phase = self.series(PHASE)
        switched = steps[phase == Phase.ACCURACY_ONLY]
        return int(switched[0]) if switched.size else None

    def parallel_windows(self) -> list[tuple[int, int]]:
        """First and last step of every run of consecutive steps under the parallel reward."""
        steps, phase = self.series(PHASE)
        inside = steps[phase == Phase.PARALLEL].tolist()
        cuts = [0, *(i for i, (a, b) in enumerate(pairwise(inside), start=1) if b != a + 1), len(inside)]
        return [(inside[a], inside[b - 1]) for a, b in pairwise(cuts) if b > a]


def load_training_metrics(paths: Sequence[Path]) -> TrainingMetrics:
    """Merge the files of verl's file logger, `{"step": N, "data": {name: number}}` a line.

    Files are given oldest first: a resumed run writes a new one, and repeats steps after its checkpoint. Where a metric
    was logged twice for a step, the later value wins. Values that are not finite numbers are left out, and so is the
    last line of a file where it is not JSON (the run was killed while writing it).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line than the last is not JSON, or a line has another form.
    """
    metrics = TrainingMetrics()
    for path in paths:
        lines = Path(path).read_bytes().splitlines()  # bytes: a torn line may end inside a character
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(
                        f"{path}: line {number} of {len(lines)} is not JSON ({error}); only the last line of a killed "
                        "run may be torn: remove the line, or leave the file out"
                    ) from error
                metrics.skipped_lines += 1
                continue
            step = record.get("step") if isinstance(record, dict) else None
            data = record.get("data") if isinstance(record, dict) else None
            if not isinstance(step, int) or not isinstance(data, dict):
                raise ValueError(
                    f'{path}: line {number}: found {record!r:.80}, expected {{"step": N, "data": {{...}}}}; '
                    "give files written by verl's file logger"
                )
            finite = {k: float(v) for k, v in data.items() if isinstance(v, int | float) and math.isfinite(v)}
            metrics.values.setdefault(step, {}).update(finite)
    return metrics


def plot_training(metrics: TrainingMetrics, out: Path) -> list[Path]:
    """Write one PNG for each of the four metrics and the overview `training.png` into `out`; return their paths.

    1600 x 900 pixels each, 1600 x 1200 the overview. A metric that was never logged gets a panel that says so. Uses the
    Agg canvas and no pyplot, so it needs no display and leaves no state behind.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for panel in PANELS:
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        written.append(_save(figure, [figure.subplots()], (panel,), metrics, out / panel.file))
    figure = Figure(figsize=OVERVIEW_SIZE, dpi=DPI, layout="constrained")
    written.append(_save(figure, list(figure.subplots(2, 2).flat), PANELS, metrics, out / OVERVIEW))
    return written


def smooth(steps: np.ndarray, values: np.ndarray, window: int = SMOOTHING) -> np.ndarray:
    """(points,) mean of the values of the last `window` steps at every point.

    Looks back only, so that nothing from after the switch shows before it. Steps that were not logged are missing from
    the mean rather than counted as something.
    """
    first = np.searchsorted(steps, steps - window, side="right")
    return np.array([values[a : b + 1].mean() for b, a in enumerate(first)])


def _save(figure: Figure, axes: list[Axes], panels: Sequence[_Panel], metrics: TrainingMetrics, path: Path) -> Path:
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, metrics)
    figure.legend(handles=_legend(metrics), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _draw(ax: Axes, panel: _Panel, metrics: TrainingMetrics) -> None:
    ax.set_title(panel.title, fontsize=11)
    ax.set_xlabel("training step", fontsize=9)
    ax.set_ylabel(panel.label, fontsize=9)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    steps, values = metrics.series(panel.metric)
    if not steps.size:
        ax.text(0.5, 0.5, f"no data\n({panel.metric})", transform=ax.transAxes, ha="center", va="center", fontsize=11)
        ax.set(xticks=[], yticks=[])
        return
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.plot(steps, values, color=_RAW, alpha=0.6, linewidth=1, marker="o", markersize=2.5 if steps.size <= 100 else 0)
    ax.plot(steps, smooth(steps, values), color=_SMOOTH, linewidth=2)
    bottom, top = (min(-0.03, values.min()), max(1.03, values.max())) if panel.share else ax.get_ylim()
    ax.set_ylim(bottom, top + 0.12 * (top - bottom))  # room for the label of the switch
    low, high = min(metrics.values) - 0.5, max(metrics.values) + 0.5  # every panel shows the whole run
    ax.set_xlim(low, high)
    ax.xaxis.get_major_locator().set_params(integer=True)
    for first, last in metrics.parallel_windows():
        ax.axvspan(first - 0.5, last + 0.5, color=_WINDOW, alpha=_WINDOW_ALPHA, linewidth=0, zorder=0)
    switch = metrics.switch_step()
    if switch is not None:
        at = switch - 0.5  # between the last step of the old reward and the first of the new
        ax.axvline(at, color=_SWITCH, linewidth=1.5, linestyle="--")
        left = at - low > (high - low) / 2
        ax.annotate(
            f"accuracy only from step {switch}",
            (at, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            fontsize=8.5,
            color=_SWITCH,
        )


def _legend(metrics: TrainingMetrics) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_RAW, alpha=0.6, marker="o", markersize=2.5, linewidth=1, label="each step"),
        Line2D([], [], color=_SMOOTH, linewidth=2, label=f"mean of the last {SMOOTHING} steps"),
    ]
    if metrics.parallel_windows():
        handles.append(Patch(color=_WINDOW, alpha=_WINDOW_ALPHA, linewidth=0, label="S2: parallel reward"))
    if metrics.switch_step() is not None:
        handles.append(Line2D([], [], color=_SWITCH, linestyle="--", linewidth=1.5, label="mid-training switch"))
    return handles
