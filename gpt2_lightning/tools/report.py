"""``gpt2 report``: one or several runs on one page, as HTML that needs nothing else and as a picture."""

import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from gpt2_lightning import __version__
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file
from gpt2_lightning.tools.charts import (
    AXIS_GREY,
    COLOURS,
    comparable,
    draw_all,
    draw_panel,
    hellaswag_set,
    panels,
    standard_error,
)
from gpt2_lightning.tools.references import HELLASWAG
from gpt2_lightning.tools.runs import MAIN_SETTINGS, Run, Start, read_run

IGNORED_SETTINGS = re.compile(
    r"run_dir|resume|ckpt_path|weights_only|trainer\.(logger|enable_.*|default_root_dir|callbacks)"
)
"""Settings that make no other model: where a run lies, what it shows."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    """Writes ``report.html`` and ``report.png``; gives the page's path, and what could not be shown, in sentences.

    Args:
        folders: runs; those that cannot be read are left out and told of.
        out: folder to write to; that of the first run that can be read if None.

    Raises:
        ValueError: none of them can be read; what the first one lacks. Or there is no matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the charts are drawn by matplotlib, which is not here: pip install matplotlib")
    runs, found, notes = [], [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            notes.append(str(error))
            continue
        found.append(folder)
    if not runs:
        raise UserError(notes[0])
    if len({run.name for run in runs}) < len(runs):  # a/run and b/run
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, found, strict=True)]
    notes += [note for run in runs for note in run.notes] + compare(runs)
    out = out or found[0]
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "report.html") as file:
        file.write(page(runs, notes).encode())
    with atomic_file(out / "report.png") as file:
        draw_all(runs).savefig(file, format="png", dpi=150)
    return out / "report.html", notes


def compare(runs: Sequence[Run]) -> list[str]:
    """What of these runs cannot be compared, one sentence each."""
    alike = comparable(runs)
    found = [
        f"{run.name} has another vocabulary than {runs[0].name} (model.config.vocab_size="
        f"{run.config.get('model.config.vocab_size', 'not recorded')}), so their losses cannot be compared: "
        "the charts leave its loss out"
        for run in runs
        if run not in alike
    ]
    for run in alike[1:]:
        ours, theirs = run.config.get("data.source"), alike[0].config.get("data.source")
        if ours and theirs and ours != theirs:
            found.append(f"{run.name} is on {ours} and {alike[0].name} on {theirs}: their losses are of different text")
    return found


def figures(run: Run) -> dict[str, str]:
    """What a run has reached, by name."""
    found = {}
    if val := run.curves.get("val/loss"):
        lowest = np.nanmin(val.values)
        best = "" if val.last == lowest else f"; lowest {lowest:.4f}"
        found["val/loss"] = f"{val.last:.4f} (after {val.steps[-1]:,} steps{best})"
    if train := run.curves.get("train/loss"):
        last = train.values[-max(1, len(train.values) // 50) :]
        found["train/loss"] = f"{last.mean():.4f} (mean of the last {len(last)} logged steps)"
    for tag in HELLASWAG:
        if score := run.curves.get(f"{tag}/acc_norm"):
            name, rows = hellaswag_set(run, tag)
            error = f" ± {standard_error(score.values[-1:], rows)[0]:.4f} (n = {rows:,}, {name})" if rows else ""
            found[f"{tag}/acc_norm"] = f"{score.last:.4f}{error or ' (n not recorded)'}"
    steps = max(curve.steps[-1] + tag.startswith("train/") for tag, curve in run.curves.items())
    of = run.config.get("trainer.max_steps", "")
    found["steps"] = f"{steps:,}" + (f" of {int(of):,}" if of.isdigit() else "")
    found["tokens"] = f"{run.tokens_after(np.array([steps]))[0]:,.0f}"
    if run.starts:
        found["time"] = f"{_hours(sum(start.seconds for start in run.starts))}, evaluations and all"
    if speed := run.curves.get("train/tokens_per_sec"):
        found["tokens/s"] = f"{np.median(speed.values):,.0f} (median, evaluations left out)"
    if mfu := run.curves.get("train/mfu"):
        found["MFU"] = f"{np.median(mfu.values):.1%} (median)"
    return found


def settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Of one run its main settings, of several those that differ: name → the value of each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.config if not IGNORED_SETTINGS.fullmatch(name)))
    table = {name: [run.config.get(name, "–") for run in runs] for name in names}
    if len(runs) == 1:
        return {name: values for name, values in table.items() if MAIN_SETTINGS.fullmatch(name)}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def starts(run: Run) -> list[tuple[str, str, str]]:
    """Each start of a run: when, which steps, and what was made again or set anew."""
    rows = []
    for i, start in enumerate(run.starts):
        when = datetime.fromtimestamp(start.began).strftime("%Y-%m-%d %H:%M:%S")
        steps = f"{start.first_step:,} to {start.last_step:,}" if start.last_step >= 0 else "none"
        rows.append((f"{when}, {_hours(start.seconds)}", steps, "; ".join(_what_changed(run, i, start))))
    return rows


def _what_changed(run: Run, i: int, start: Start) -> Iterable[str]:
    reached = max((before.last_step for before in run.starts[:i]), default=-1) + 1
    if i > 0 and start.first_step >= 0:
        yield f"went on after {start.first_step:,} steps" if start.first_step > 0 else "began anew"
        if reached > start.first_step:
            yield f"made {reached - start.first_step:,} steps again"
    if i > 0 and len(run.configs) == len(run.starts):
        ours, theirs = run.configs[i], run.configs[i - 1]
        for name in ours:
            if ours[name] != theirs.get(name) and not IGNORED_SETTINGS.fullmatch(name):
                yield f"{name}: {theirs.get(name, '–')} → {ours[name]}"


def samples(run: Run) -> list[tuple[int, str]]:
    """The first, the middle and the last set of samples: (steps behind it, text)."""
    texts = sorted(run.texts.get("samples", {}).items())
    chosen = sorted({0, len(texts) // 2, len(texts) - 1}) if texts else []
    return [(texts[i][0], plain(texts[i][1])) for i in chosen]


def plain(markdown: str) -> str:
    """Text as it was before it was indented for TensorBoard, which takes it for Markdown."""
    return re.sub(r"^    ", "", markdown, flags=re.MULTILINE)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: normal; opacity: .8; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { figure svg { filter: brightness(1.35); } }
.notes { border-left: 4px solid #D55E00; padding-left: 1rem; }
.run::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .4em;
  background: var(--colour); }
pre { background: var(--soft); padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem; }
footer { margin-top: 3rem; font-size: .85rem; opacity: .8; }
"""


def page(runs: Sequence[Run], notes: Sequence[str] = ()) -> str:
    """The whole page: whatever comes from a run is escaped, and nothing is asked of any other place."""
    title = f"gpt2 report: {', '.join(run.name for run in runs)}"
    heads = [_head(i, run) for i, run in enumerate(runs)]
    reached = [figures(run) for run in runs]
    names = list(dict.fromkeys(name for found in reached for name in found))
    parts = [f"<h1>{_text(title)}</h1>"]
    if notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{_text(note)}</li>" for note in notes)}</ul>')
    parts += [
        "<h2>Reached</h2>",
        _table(["", *heads], [[name, *(f.get(name, "–") for f in reached)] for name in names]),
    ]
    parts += ["<h2>Curves</h2>", _charts(runs)]
    parts += _samples(runs, heads)
    found = settings(runs)
    parts.append(f"<h2>{'Settings' if len(runs) == 1 else 'Settings that differ'}</h2>")
    parts.append(_table(["", *heads], [[name, *values] for name, values in found.items()]) if found else "<p>None.</p>")
    parts.append("<h2>Starts</h2>")
    for run, head in zip(runs, heads, strict=True):
        rows = [[str(i), *row] for i, row in enumerate(starts(run), 1)]
        if rows:
            parts += [f"<h3>{head}</h3>" if len(runs) > 1 else "", _table(["", "when", "steps trained", "what"], rows)]
    parts.append(
        f"<footer>gpt2_lightning {__version__}, {datetime.now():%Y-%m-%d %H:%M}. Lines of GPT-2: OpenAI's weights as "
        "build-nanogpt measured them; of GPT-3: its paper. Losses stand at the tokens behind the weights that they are "
        "of.</footer>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text)


def _head(i: int, run: Run) -> str:
    return f'<span class="run" style="--colour: {COLOURS[i % len(COLOURS)]}">{_text(run.name)}</span>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``heads`` are HTML, the cells are text."""
    head = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _charts(runs: Sequence[Run]) -> str:
    drawn = []
    for number, (panel, of) in enumerate(panels(runs)):
        file = io.BytesIO()
        draw_panel(panel, of).savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue().decode()
        svg = svg[svg.index("<svg") :].replace(AXIS_GREY, "currentColor")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        # an id is of the page, not of one chart
        svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>chart{number}-", svg)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_text(panel.alt(of))}" ', 1)
        drawn.append(f"<figure>{svg}</figure>")
    return f'<div class="charts">{"".join(drawn)}</div>'


def _samples(runs: Sequence[Run], heads: Sequence[str]) -> list[str]:
    parts = []
    for run, head in zip(runs, heads, strict=True):
        found = samples(run)
        if found:
            parts.append(f"<h3>{head}</h3>" if len(runs) > 1 else "")
            prompt = run.config.get("samples.prompt")
            parts.append(f"<p>Prompt: <code>{_text(prompt)}</code></p>" if prompt else "")
            for step, text in found:
                parts.append(f"<div>after {step:,} steps</div><pre>{_text(text)}</pre>")
    return ["<h2>Samples</h2>", *parts] if parts else []
