"""Draws the curves of one or several runs, with published figures, as one picture."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_lightning.evals.scores import standard_error
from gpt2_lightning.tokenizer import VOCAB_SIZE
from gpt2_lightning.tools.references import CHANCE, HELLASWAG, HELLASWAG_EXAMPLES, VAL_LOSS, VAL_LOSS_SOURCE
from gpt2_lightning.tools.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
GREY = "#808080"
STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # a run may be named $x$
}
LATE = 0.1
"""The second loss chart starts after this share of the tokens, to show the end of the run enlarged."""

NumberedRuns = dict[int, Run]
"""Runs by their position in the report, which determines their colour in every chart."""


@dataclass(frozen=True)
class Panel:
    title: str
    y_label: str
    tags: tuple[str, ...]
    """Drawn for the runs that have one of these curves."""
    draw: Callable[["Axes", NumberedRuns], None]


def draw_charts(runs: Sequence[Run]) -> "Figure":
    """All charts for which there are curves, two in a row."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    found = panels(runs)
    rows = (len(found) + 1) // 2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4 * rows), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
        axes = figure.subplots(rows, 2, squeeze=False)
        for ax, (panel, drawn) in zip(axes.flat, found, strict=False):
            panel.draw(ax, drawn)
            ax.set_title(panel.title)
            ax.set_ylabel(panel.y_label)
            ax.set_xlabel("tokens trained on")
            ax.xaxis.set_major_formatter(_thousands)
            labels = ax.get_legend_handles_labels()[1]
            if len(labels) > 1:  # below the chart, where it hides nothing
                ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)
        if len(found) % 2:
            axes[-1, -1].remove()
    return figure


def panels(runs: Sequence[Run]) -> list[tuple[Panel, NumberedRuns]]:
    """The charts to draw, each with its runs. Loss charts leave out runs with another vocabulary."""
    found = []
    alike = comparable(runs)
    for panel in PANELS:
        is_loss = "val/loss" in panel.tags
        drawn = {
            i: run
            for i, run in enumerate(runs)
            if any(tag in run.curves for tag in panel.tags) and (run in alike or not is_loss)
        }
        if drawn:
            found.append((panel, drawn))
    return found


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs with the first one's vocabulary: nats per token of another vocabulary are another unit."""
    return [run for run in runs if _vocab_size(run) == _vocab_size(runs[0])]


def _vocab_size(run: Run) -> int:
    """Without padding: 50304 is GPT-2's 50257."""
    return min(int(run.config.get("model.config.vocab_size", VOCAB_SIZE)), VOCAB_SIZE)


def hellaswag_set(run: Run, tag: str) -> tuple[str, int | None]:
    """Name and number of the examples that a run was scored on, if it logged them."""
    texts = run.texts.get(f"{tag}/examples", {})
    logged = re.fullmatch(r"(.*), (\d+) examples", texts[max(texts)] if texts else "")
    return (logged[1], int(logged[2])) if logged else ("", None)


def _draw_loss(ax: "Axes", runs: NumberedRuns) -> None:
    _draw_losses(ax, runs)
    if all(_vocab_size(run) == VOCAB_SIZE for run in runs.values()):
        _draw_references(ax, VAL_LOSS, "" if _is_fineweb(runs) else "on FineWeb-EDU")
    if (last := _last_tokens(runs)) > 0:
        ax.set_xscale("log", nonpositive="mask")
        ax.set_xlim(left=last / 1000)  # three decades: before them there is little but the warmup
        ax.xaxis.set_minor_formatter("")


def _draw_late_loss(ax: "Axes", runs: NumberedRuns) -> None:
    _draw_losses(ax, runs)
    last = _last_tokens(runs)
    shown: list[float] = []
    if _is_fineweb(runs):
        _draw_references(ax, VAL_LOSS)
        shown += VAL_LOSS.values()
    for run in runs.values():
        for curve in _losses(run):
            late = curve.values[(run.tokens_after(curve.steps) >= LATE * last) & np.isfinite(curve.values)]
            if len(late):
                shown += np.quantile(late, (0.05, 0.95)).tolist()  # the noise of single steps may leave the frame
    ax.set_xlim(LATE * last, last or 1)
    if shown:
        margin = 0.1 * (max(shown) - min(shown)) + 0.01
        ax.set_ylim(min(shown) - margin, max(shown) + margin)


def _draw_losses(ax: "Axes", runs: NumberedRuns) -> None:
    for i, run in runs.items():
        if train := run.curves.get("train/loss"):
            x = run.tokens_after(train.steps)
            ax.plot(x, train.values, color=_colour(i), alpha=0.35, linewidth=0.8, label=f"{run.name}: train")
        if val := run.curves.get("val/loss"):
            _draw_line(ax, i, run, val, f"{run.name}: validation")


def _losses(run: Run) -> list[Curve]:
    return [run.curves[tag] for tag in ("train/loss", "val/loss") if tag in run.curves]


def _last_tokens(runs: NumberedRuns) -> float:
    return max(run.tokens_after(curve.steps)[-1] for run in runs.values() for curve in _losses(run))


def _is_fineweb(runs: NumberedRuns) -> bool:
    """Whether all runs are validated on the text of the published loss."""
    return all(run.config.get("data.source") == VAL_LOSS_SOURCE for run in runs.values())


def _draw_hellaswag(ax: "Axes", runs: NumberedRuns, tag: str) -> None:
    sizes = {i: hellaswag_set(run, tag)[1] for i, run in runs.items()}
    for i, run in runs.items():
        curve, n = run.curves[f"{tag}/acc_norm"], sizes[i]
        _draw_line(ax, i, run, curve, f"{run.name} ({n:,} examples)" if n else run.name)
        if n:
            x, error = run.tokens_after(curve.steps), standard_error(curve.values, n)
            label = "± one standard error" if i == max(runs) else None
            ax.fill_between(
                x, curve.values - error, curve.values + error, color=_colour(i), alpha=0.15, linewidth=0, label=label
            )
    whole_set = all(n in (None, HELLASWAG_EXAMPLES) for n in sizes.values())
    _draw_references(ax, HELLASWAG[tag], "" if whole_set else f"on {HELLASWAG_EXAMPLES:,} examples")
    _draw_references(ax, {"chance": CHANCE})
    ax.set_ylim(min(CHANCE, ax.dataLim.ymin) - 0.02, max(*HELLASWAG[tag].values(), ax.dataLim.ymax) + 0.02)


def _draw_lr(ax: "Axes", runs: NumberedRuns) -> None:
    for i, run in runs.items():
        _draw_line(ax, i, run, run.curves["train/lr"], run.name)
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))


def _draw_grad_norm(ax: "Axes", runs: NumberedRuns) -> None:
    _draw_noisy(ax, runs, "train/grad_norm")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")


def _draw_speed(ax: "Axes", runs: NumberedRuns) -> None:
    _draw_noisy(ax, runs, "train/tokens_per_sec")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(_thousands)


def _draw_line(ax: "Axes", i: int, run: Run, curve: Curve, label: str) -> None:
    marker = "o" if len(curve.steps) <= 50 else ""
    x = run.tokens_after(curve.steps)
    ax.plot(x, curve.values, color=_colour(i), marker=marker, markersize=3.5, label=label)


def _draw_noisy(ax: "Axes", runs: NumberedRuns, tag: str) -> None:
    """Every step faintly, and on top the medians of a hundredth of the run each."""
    for i, run in runs.items():
        curve = run.curves[tag]
        x, finite = run.tokens_after(curve.steps), np.isfinite(curve.values)
        ax.plot(x, curve.values, color=_colour(i), alpha=0.35, linewidth=0.8)
        parts = [part for part in np.array_split(np.flatnonzero(finite), 100) if len(part)]
        medians = [[np.median(x[part]), np.median(curve.values[part])] for part in parts]
        ax.plot(*np.array(medians).reshape(-1, 2).T, color=_colour(i), label=f"{run.name} (median)")


def _draw_references(ax: "Axes", figures: dict[str, float], where: str = "") -> None:
    """Horizontal lines, named in the margin. Dotted if they were measured elsewhere, which ``where`` says."""
    for name, y in figures.items():
        ax.axhline(y, color=GREY, linewidth=1, linestyle=":" if where else "-", alpha=0.8)
        label = f"{name} {y:g}" + (f"\n{where}" if where else "")
        ax.annotate(label, (1, y), (4, 0), ax.get_yaxis_transform(), "offset points", va="center", fontsize=8)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _thousands(value: float, _position: float = 0) -> str:
    """250k, 1.5M, 10B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _hellaswag_panel(tag: str) -> Panel:
    title = "HellaSwag (harness style)" if "harness" in tag else "HellaSwag"
    return Panel(title, "acc_norm", (f"{tag}/acc_norm",), lambda ax, runs: _draw_hellaswag(ax, runs, tag))


PANELS = (
    Panel("Loss", "nats per token", ("val/loss", "train/loss"), _draw_loss),
    Panel(
        f"Loss after the first {LATE:.0%} of the tokens", "nats per token", ("val/loss", "train/loss"), _draw_late_loss
    ),
    *map(_hellaswag_panel, HELLASWAG),
    Panel("Learning rate", "learning rate", ("train/lr",), _draw_lr),
    Panel("Gradient norm before clipping", "norm", ("train/grad_norm",), _draw_grad_norm),
    Panel("Speed", "tokens per second, all devices", ("train/tokens_per_sec",), _draw_speed),
)
