"""A run's curves as charts, several runs in each. Drawing only: what is drawn comes from ``run_folder``."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_lightning.tokenizer import VOCAB_SIZE
from gpt2_lightning.tools.references import CHANCE, HELLASWAG, HELLASWAG_EXAMPLES, VAL_LOSS, VAL_LOSS_SOURCE
from gpt2_lightning.tools.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, told apart by the colour-blind, and on white as on black; the dashes below tell them apart again."""
DASHES = ("-", "--", "-.", ":")
GREY = "#808080"
AXIS_GREY = "#707172"
"""Of text and axes: no other line has it, so that a page can put its own text colour in its place."""
STYLE: Any = {
    "axes.edgecolor": AXIS_GREY,
    "axes.grid": True,
    "axes.labelcolor": AXIS_GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.color": AXIS_GREY,
    "text.parse_math": False,  # a run may be named $x$
    "xtick.color": AXIS_GREY,
    "ytick.color": AXIS_GREY,
}
LATE = 0.1
"""The part of a run's tokens that the second chart of the loss leaves out, to show the end large."""
MOST_POINTS = 2000
"""Of a line: more than there are pixels only make the file large."""


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs whose loss is in the same unit as that of the first: nats per token of the same vocabulary."""
    return [run for run in runs if _vocabulary(run) == _vocabulary(runs[0])]


def _vocabulary(run: Run) -> int:
    """Its size, GPT-2's with padding and without being one."""
    return min(int(run.config.get("model.config.vocab_size", VOCAB_SIZE)), VOCAB_SIZE)


def hellaswag_set(run: Run, tag: str) -> tuple[str, int | None]:
    """The name of the questions of a run's HellaSwag and how many they are, where it has said so."""
    texts = run.texts.get(f"{tag}/examples", {})
    said = re.fullmatch(r"(.*), (\d+) rows", texts[max(texts)] if texts else "")
    return (said[1], int(said[2])) if said else ("", None)


def standard_error(accuracy: np.ndarray, rows: int) -> np.ndarray:
    """Of a share of right answers, from the sample's variance, as lm-evaluation-harness gives it."""
    return np.sqrt(accuracy * (1 - accuracy) / max(rows - 1, 1))


Numbered = dict[int, Run]
"""Runs by their place on the page, which decides their colour in every chart."""


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    tags: tuple[str, ...]
    """It is drawn where a run has one of these curves; the first that it has is the one that ``alt`` tells of."""
    draw: Callable[["Axes", Numbered], None]

    def alt(self, runs: Numbered) -> str:
        """The chart in words."""
        told = []
        for run in runs.values():
            curve = next(run.curves[tag] for tag in self.tags if tag in run.curves)
            told.append(f"{run.name} goes from {curve.values[0]:.4g} to {curve.last:.4g}")
        return f"Chart of {self.title}, against tokens: {'; '.join(told)}."


def _loss(ax: "Axes", runs: Numbered) -> None:
    _draw_losses(ax, runs)
    last = _last(runs)
    if last > 0:
        ax.set_xscale("log", nonpositive="mask")
        ax.set_xlim(left=last / 1000)  # three decades: before them is little more than the warm-up
        ax.xaxis.set_minor_formatter("")
    for i, run in runs.items():
        resumed = [start.first_step for start in run.starts[1:] if start.first_step > 0]
        if resumed:
            at = run.tokens_after(np.array(resumed))
            line = ax.plot(at, np.zeros(len(at)), "^", color=_colour(i), transform=ax.get_xaxis_transform())[0]
            line.set_clip_on(False)
            line.set_label(f"{_short(run)}: resumed")


def _late_loss(ax: "Axes", runs: Numbered) -> None:
    _draw_losses(ax, runs, only_like=True)
    last = _last(runs)
    ends = [curve.values[_x(run, curve) >= LATE * last] for run in runs.values() for curve in _losses(run)]
    ends = [finite for end in ends if len(finite := end[np.isfinite(end)])]
    ax.set_xlim(LATE * last, last or 1)
    if ends:  # the noise of small steps may leave the frame
        lines = [*VAL_LOSS.values()] if _is_fineweb(runs) else []
        y = np.concatenate([lines, *(np.quantile(end, (0.05, 0.95)) for end in ends)])
        margin = 0.1 * np.ptp(y) + 0.01
        ax.set_ylim(y.min() - margin, y.max() + margin)


def _last(runs: Numbered) -> float:
    """Tokens behind the last loss of any of them."""
    return max(_x(run, curve)[-1] for run in runs.values() for curve in _losses(run))


def _losses(run: Run) -> list[Curve]:
    return [run.curves[tag] for tag in ("train/loss", "val/loss") if tag in run.curves]


def _is_fineweb(runs: Numbered) -> bool:
    """Whether GPT-2's published loss is on what these are validated on."""
    return all(run.config.get("data.source") == VAL_LOSS_SOURCE for run in runs.values())


def _draw_losses(ax: "Axes", runs: Numbered, only_like: bool = False) -> None:
    for i, run in runs.items():
        if train := run.curves.get("train/loss"):
            x, y = _thinned(_x(run, train), train.values)
            ax.plot(x, y, color=_colour(i), alpha=0.35, linewidth=0.8, label=f"{_short(run)}: train")
        if val := run.curves.get("val/loss"):
            few = len(val.steps) <= 50
            ax.plot(_x(run, val), val.values, _dash(i), marker="o" if few else "", markersize=3.5, color=_colour(i),
                    label=f"{_short(run)}: validation")  # fmt: skip
    if _is_fineweb(runs) or (not only_like and all(_vocabulary(run) == VOCAB_SIZE for run in runs.values())):
        _lines(ax, VAL_LOSS, "" if _is_fineweb(runs) else "on FineWeb-EDU")
    ax.set_ylabel("loss, nats per token")


def _hellaswag(tag: str) -> Callable[["Axes", Numbered], None]:
    def draw(ax: "Axes", runs: Numbered) -> None:
        for i, run in runs.items():
            curve = run.curves[f"{tag}/acc_norm"]
            x, y, rows = _x(run, curve), curve.values, hellaswag_set(run, tag)[1]
            few = len(y) <= 50
            of = f" ({rows:,} rows)" if rows else ""
            ax.plot(x, y, _dash(i), marker="o" if few else "", markersize=3.5, color=_colour(i), label=_short(run) + of)
            if rows:
                error = standard_error(y, rows)
                label = "± one standard error" if i == max(runs) else None
                ax.fill_between(x, y - error, y + error, color=_colour(i), alpha=0.15, linewidth=0, label=label)
        all_rows = all(hellaswag_set(run, tag)[1] in (None, HELLASWAG_EXAMPLES) for run in runs.values())
        _lines(ax, HELLASWAG[tag], "" if all_rows else f"on {HELLASWAG_EXAMPLES:,} rows")
        _lines(ax, {"chance": CHANCE})
        drawn, published = ax.dataLim, HELLASWAG[tag].values()
        ax.set_ylim(min(CHANCE, drawn.ymin) - 0.02, max(*published, drawn.ymax) + 0.02)
        ax.set_ylabel("share of right endings")

    return draw


def _rate(ax: "Axes", runs: Numbered) -> None:
    for i, run in runs.items():
        curve = run.curves["train/lr"]
        ax.plot(_x(run, curve), curve.values, _dash(i), color=_colour(i), label=_short(run))
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    ax.set_ylabel("learning rate")


def _grad_norm(ax: "Axes", runs: Numbered) -> None:
    _noisy(ax, runs, "train/grad_norm")
    clips = {run.config.get("trainer.gradient_clip_val", "null") for run in runs.values()}
    if len(clips) == 1 and (clip := clips.pop()) not in ("null", "0"):
        _lines(ax, {"clipped at": float(clip)})
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}" if np.ptp(np.log10(ax.get_ylim())) < 1.5 else "")
    ax.set_ylabel("norm before clipping")


def _step_tokens(ax: "Axes", runs: Numbered) -> None:
    for i, run in runs.items():
        curve = run.step_tokens()
        assert curve is not None
        ax.plot(_x(run, curve), curve.values, _dash(i), color=_colour(i), label=_short(run), drawstyle="steps-post")
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.yaxis.set_major_formatter(_thousands)
    ax.set_ylabel("tokens per step")


def _speed(ax: "Axes", runs: Numbered) -> None:
    _noisy(ax, runs, "train/tokens_per_sec")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(_thousands)
    ax.set_ylabel("tokens per second, all devices")


def _noisy(ax: "Axes", runs: Numbered, tag: str) -> None:
    """Each step faintly, and over it medians."""
    for i, run in runs.items():
        curve = run.curves[tag]
        x, y = _x(run, curve), curve.values
        ax.plot(*_thinned(x, y), color=_colour(i), alpha=0.35, linewidth=0.8)
        ax.plot(*_medians(x, y), _dash(i), color=_colour(i), label=f"{_short(run)} (median)")


PANELS = (
    Panel("Loss, the whole run", ("val/loss", "train/loss"), _loss),
    Panel(f"Loss, after the first {LATE:.0%} of the tokens", ("val/loss", "train/loss"), _late_loss),
    *(
        Panel(
            f"HellaSwag acc_norm{' (harness style)' if 'harness' in tag else ''}", (f"{tag}/acc_norm",), _hellaswag(tag)
        )
        for tag in HELLASWAG
    ),
    Panel("Learning rate", ("train/lr",), _rate),
    Panel("Gradient norm", ("train/grad_norm",), _grad_norm),
    Panel("Batch size", ("train/tokens",), _step_tokens),
    Panel("Speed", ("train/tokens_per_sec",), _speed),
)


def panels(runs: Sequence[Run]) -> list[tuple[Panel, Numbered]]:
    """The charts that these runs give, each with those it is of; of the loss, only those that can share an axis."""
    found = []
    alike = {id(run) for run in comparable(runs)}
    for panel in PANELS:
        drawn = {
            i: run
            for i, run in enumerate(runs)
            if any(tag in run.curves for tag in panel.tags) and ("val/loss" not in panel.tags or id(run) in alike)
        }
        if drawn:
            found.append((panel, drawn))
    return found


def draw_all(runs: Sequence[Run]) -> "Figure":
    """All charts in one figure on white, two in a row, 1200 pixels wide at 100 dpi."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = panels(runs)
    rows = (len(found) + 1) // 2
    dark = {name: "#202020" for name, value in STYLE.items() if value == AXIS_GREY}
    with matplotlib.rc_context(STYLE | dark):
        figure = Figure(figsize=(12, 4 * rows), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
        axes = figure.subplots(rows, 2, squeeze=False)
        for ax, (panel, drawn) in zip(axes.flat, found, strict=False):
            _finish(ax, panel, drawn)
        if len(found) % 2:
            axes[-1, -1].remove()
    return figure


def draw_panel(panel: Panel, runs: Numbered) -> "Figure":
    """One chart alone, on nothing."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        _finish(figure.subplots(), panel, runs)
    figure.patch.set_visible(False)
    figure.axes[0].patch.set_visible(False)
    return figure


def _finish(ax: "Axes", panel: Panel, runs: Numbered) -> None:
    panel.draw(ax, runs)
    ax.set_title(panel.title)
    ax.set_xlabel("tokens trained on")
    ax.xaxis.set_major_formatter(_thousands)
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) > 1:  # below the chart, where it hides nothing
        columns = 2 if max(map(len, labels)) < 32 else 1
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns, borderaxespad=0, handlelength=3)


def _short(run: Run) -> str:
    """The end of a long name, which is a path."""
    return run.name if len(run.name) <= 40 else f"…{run.name[-39:]}"


def _thousands(value: float, _position: float = 0) -> str:
    """250k, 1.5M, 10B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _lines(ax: "Axes", figures: dict[str, float], where: str = "") -> None:
    """Lines across a chart, named in its margin; dotted where they are of something else, told in ``where``."""
    for name, y in figures.items():
        ax.axhline(y, color=GREY, linewidth=1, linestyle=":" if where else "-", alpha=0.8)
        label = f"{name} {y:g}" + (f"\n{where}" if where else "")
        ax.annotate(label, (1, y), (4, 0), ax.get_yaxis_transform(), "offset points", va="center", fontsize=8)


def _x(run: Run, curve: Curve) -> np.ndarray:
    """Tokens behind the weights that each value is of: the loss of step s is that of the weights after s steps."""
    return run.tokens_after(curve.steps)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _dash(i: int) -> str:
    return DASHES[i % len(DASHES)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A long line by the lowest and the highest point of each part, so that its spikes stay; NaN and inf do not."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
    kept = np.array([sorted((part[y[part].argmin()], part[y[part].argmax()])) for part in parts]).ravel()
    return x[kept], y[kept]


def _medians(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each hundredth of a line; all of it where that is less than three points."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) < 300:
        return x, y
    parts = np.array_split(np.arange(len(x)), 100)
    return np.array([np.median(x[part]) for part in parts]), np.array([np.median(y[part]) for part in parts])
