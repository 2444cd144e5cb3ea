"""``gpt2 report``: one or several runs as an HTML page that stands alone, and as a picture."""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from gpt2_lightning import __version__
from gpt2_lightning.errors import UserError
from gpt2_lightning.evals.scores import standard_error
from gpt2_lightning.files import atomic_file
from gpt2_lightning.tools.charts import COLOURS, comparable, draw_charts, hellaswag_set, panels
from gpt2_lightning.tools.references import HELLASWAG
from gpt2_lightning.tools.runs import Run, read_run

MAIN_SETTINGS = re.compile(
    r"model\.(config\..*|init_from|optimizer.*|lr_scheduler.*)|data\.(?!num_workers).*|"
    r"trainer\.(max_steps|precision|devices|num_nodes|strategy|gradient_clip_val)|seed_everything"
)
"""The settings to list for a single run."""
IGNORED_SETTINGS = re.compile(
    r"run_dir|resume|ckpt_path|weights_only|trainer\.(logger|enable_.*|default_root_dir|callbacks)"
)
"""Settings that do not change the model: differences in them are not listed."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    """Writes ``report.html`` and ``report.png``.

    Args:
        folders: of runs.
        out: folder to write to; None is the first run's.

    Returns:
        The path of the page, and notes on what cannot be compared.

    Raises:
        UserError: a folder has no run, or matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib: pip install matplotlib")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # a/run and b/run
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    notes = compare(runs)
    picture = io.BytesIO()
    draw_charts(runs).savefig(picture, format="png", dpi=150)
    out = out or folders[0]
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "report.png") as file:
        file.write(picture.getvalue())
    with atomic_file(out / "report.html") as file:
        file.write(page(runs, picture.getvalue(), notes).encode())
    return out / "report.html", notes


def compare(runs: Sequence[Run]) -> list[str]:
    """Notes on runs whose figures cannot be compared."""
    alike = comparable(runs)
    notes = [
        f"{run.name} has another vocabulary than {runs[0].name}: their losses cannot be compared, so the charts leave "
        f"out that of {run.name}"
        for run in runs
        if run not in alike
    ]
    for run in alike[1:]:
        ours, theirs = run.config.get("data.source"), runs[0].config.get("data.source")
        if ours and theirs and ours != theirs:
            notes.append(
                f"{run.name} was trained on {ours} and {runs[0].name} on {theirs}: their losses are of different text"
            )
    return notes


def figures(run: Run) -> dict[str, str]:
    """The results of a run by name."""
    found = {}
    if val := run.curves.get("val/loss"):
        last, lowest = val.values[-1], np.nanmin(val.values)
        best = "" if last == lowest else f"; lowest {lowest:.4f}"
        found["val/loss"] = f"{last:.4f} (after {val.steps[-1]:,} steps{best})"
    if train := run.curves.get("train/loss"):
        late = train.values[-max(1, len(train.values) // 50) :]
        found["train/loss"] = f"{late.mean():.4f} (mean of the last {len(late)} logged steps)"
    for tag in HELLASWAG:
        if score := run.curves.get(f"{tag}/acc_norm"):
            name, n = hellaswag_set(run, tag)
            error = f" ± {standard_error(score.values[-1], n):.4f} ({n:,} examples, {name})" if n else ""
            found[f"{tag}/acc_norm"] = f"{score.values[-1]:.4f}{error}"
    steps = max(curve.steps[-1] + tag.startswith("train/") for tag, curve in run.curves.items())
    max_steps = run.config.get("trainer.max_steps")
    found["steps"] = f"{steps:,}" + (f" of {int(max_steps):,}" if max_steps else "")
    found["tokens"] = f"{run.tokens_after(np.array([steps]))[0]:,.0f}"
    if run.starts:
        found["time"] = f"{_duration(sum(start.seconds for start in run.starts))} with evaluation"
    if speed := run.curves.get("train/tokens_per_sec"):
        found["tokens/s"] = f"{np.median(speed.values):,.0f} (median, without evaluation)"
    if mfu := run.curves.get("train/mfu"):
        found["MFU"] = f"{np.median(mfu.values):.1%} (median)"
    return found


def settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Name → value in each run: the main settings of a single run, or those in which several runs differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.config if not IGNORED_SETTINGS.fullmatch(name)))
    table = {name: [run.config.get(name, "–") for run in runs] for name in names}
    if len(runs) == 1:
        return {name: values for name, values in table.items() if MAIN_SETTINGS.fullmatch(name)}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def starts(run: Run) -> list[tuple[str, str, str]]:
    """Each start of a run: when, which steps, and what it repeated or changed."""
    rows = []
    for i, start in enumerate(run.starts):
        when = f"{datetime.fromtimestamp(start.began):%Y-%m-%d %H:%M:%S}, {_duration(start.seconds)}"
        steps, what = "none", []
        if start.first_step >= 0:
            steps = f"{start.first_step:,} to {start.last_step:,}"
        if i > 0 and start.first_step >= 0:
            repeated = max(earlier.last_step for earlier in run.starts[:i]) + 1 - start.first_step
            what.append(f"resumed after {start.first_step:,} steps" if start.first_step > 0 else "started over")
            what += [f"repeated {repeated:,} steps"] if repeated > 0 else []
        if i > 0 and len(run.configs) == len(run.starts):
            new, old = run.configs[i], run.configs[i - 1]
            what += [
                f"{name}: {old.get(name, '–')} → {new[name]}"
                for name in new
                if new[name] != old.get(name) and not IGNORED_SETTINGS.fullmatch(name)
            ]
        rows.append((when, steps, "; ".join(what)))
    return rows


def samples(run: Run) -> list[tuple[int, str]]:
    """The first, the middle and the last samples: (steps before them, text)."""
    texts = sorted(run.texts.get("samples", {}).items())
    chosen = sorted({0, len(texts) // 2, len(texts) - 1}) if texts else []
    # for TensorBoard, which renders Markdown, the text is indented
    return [(texts[i][0], re.sub(r"^    ", "", texts[i][1], flags=re.MULTILINE)) for i in chosen]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: normal; opacity: .8; }
img { width: 100%; height: auto; }
.notes { border-left: 4px solid #D55E00; padding-left: 1rem; }
.run::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .4em;
  background: var(--colour); }
pre { background: var(--soft); padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem; }
footer { margin-top: 3rem; font-size: .85rem; opacity: .8; }
"""


def page(runs: Sequence[Run], picture: bytes, notes: Sequence[str] = ()) -> str:
    """The whole page. All text from runs is escaped; nothing is loaded from elsewhere.

    Args:
        runs: what the page is about.
        picture: the charts as PNG.
        notes: shown at the top.
    """
    title = _escape(f"gpt2 report: {', '.join(run.name for run in runs)}")
    heads = [
        f'<span class="run" style="--colour: {COLOURS[i % len(COLOURS)]}">{_escape(run.name)}</span>'
        for i, run in enumerate(runs)
    ]
    parts = [f"<h1>{title}</h1>"]
    if notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{_escape(note)}</li>" for note in notes)}</ul>')
    results = [figures(run) for run in runs]
    names = list(dict.fromkeys(name for found in results for name in found))
    rows = [[name, *(found.get(name, "–") for found in results)] for name in names]
    parts += ["<h2>Results</h2>", _table(["", *heads], rows)]
    alt = _escape(f"Charts against tokens: {'; '.join(panel.title for panel, _ in panels(runs))}")
    data = base64.b64encode(picture).decode()
    parts += ["<h2>Curves</h2>", f'<img alt="{alt}" src="data:image/png;base64,{data}">']
    parts += _samples(runs, heads)
    parts.append(f"<h2>{'Settings' if len(runs) == 1 else 'Settings that differ'}</h2>")
    parts.append(_table(["", *heads], [[name, *values] for name, values in settings(runs).items()]))
    parts.append("<h2>Starts</h2>")
    for run, head in zip(runs, heads, strict=True):
        rows = [[str(i), *row] for i, row in enumerate(starts(run), 1)]
        parts += [f"<h3>{head}</h3>", _table(["", "when", "steps trained", "what changed"], rows)]
    parts.append(
        f"<footer>gpt2_lightning {__version__}, {datetime.now():%Y-%m-%d %H:%M}. References: GPT-2 as measured by "
        "build-nanogpt on OpenAI's weights, GPT-3 from its paper.</footer>"
    )
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _samples(runs: Sequence[Run], heads: Sequence[str]) -> list[str]:
    parts = []
    for run, head in zip(runs, heads, strict=True):
        if found := samples(run):
            prompt = run.config.get("samples.prompt", "")
            parts.append(f"<h3>{head}</h3><p>Prompt: <code>{_escape(prompt)}</code></p>")
            parts += [f"<div>after {step:,} steps</div><pre>{_escape(text)}</pre>" for step, text in found]
    return ["<h2>Samples</h2>", *parts] if parts else []


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``heads`` are HTML, the cells of ``rows`` are text."""
    head = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{_escape(name)}</th>{"".join(f"<td>{_escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_escape = html.escape
