"""``gpt2 report``: a run's folder as plain data, and as a page that stands alone."""

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from gpt2_lightning.__main__ import main
from gpt2_lightning.tools.charts import _medians, _thinned, hellaswag_set, panels, standard_error
from gpt2_lightning.tools.report import compare, figures, page, samples, settings, starts
from gpt2_lightning.tools.runs import Curve, Run, Start, flat, read_run


def _write(folder: Path, points: dict[str, dict[int, float]], purge_step: int | None = None, **texts: str) -> None:
    """One event file, as one start of a run writes it: each start in a second of its own."""
    earlier = set(folder.glob("events*"))
    with SummaryWriter(str(folder), purge_step=purge_step) as writer:
        for tag, values in points.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)
        for tag, text in texts.items():
            writer.add_text(tag, text, 0)
    (written,) = set(folder.glob("events*")) - earlier
    written.rename(folder / f"events.out.tfevents.{1_700_000_000 + len(earlier)}.host.1.0")


def _run(name: str = "one", vocab_size: str = "50304", **settings: str) -> Run:
    steps = np.arange(4)
    curves = {
        "train/loss": Curve(steps, np.array([10.0, 8.0, 6.0, 5.0])),
        "train/tokens": Curve(steps, np.array([100.0, 200.0, 400.0, 600.0])),
        "val/loss": Curve(np.array([0, 4]), np.array([11.0, 5.5])),
        "hellaswag/acc_norm": Curve(np.array([0, 4]), np.array([0.25, 0.2955])),
    }
    texts = {"hellaswag/examples": {0: "Rowan/hellaswag, 10042 rows"}}
    return Run(name, curves, texts, configs=[{"model.config.vocab_size": vocab_size} | settings])


def test_several_starts_are_one_curve(tmp_path):
    _write(tmp_path, {"train/loss": {0: 9, 1: 8, 2: 7, 3: 6, 4: 5}, "val/loss": {0: 9.5, 2: 8.5, 4: 7.5}}, 0)
    # killed; goes on from the checkpoint after step 2 and is killed before its next validation
    _write(tmp_path, {"train/loss": {2: 70, 3: 60}}, purge_step=3)
    _write(tmp_path, {"train/loss": {2: 7.25, 3: 6.25}, "val/loss": {4: 7.25}}, purge_step=3)
    run = read_run(tmp_path)
    assert run.curves["train/loss"].steps.tolist() == [0, 1, 2, 3]
    assert run.curves["train/loss"].values.tolist() == [9, 8, 7.25, 6.25]
    assert run.curves["val/loss"].steps.tolist() == [0, 2, 4]  # that at 2 came before the checkpoint, and stays
    assert run.curves["val/loss"].values.tolist() == [9.5, 8.5, 7.25]
    assert [(start.first_step, start.last_step) for start in run.starts] == [(0, 4), (2, 3), (2, 3)]
    assert run.notes == []
    assert [what for _, _, what in starts(run)] == [
        "", "went on after 2 steps; made 3 steps again", "went on after 2 steps; made 3 steps again"
    ]  # fmt: skip


def test_curves_stand_at_the_tokens_behind_the_weights():
    run = _run()
    assert run.tokens_after(np.arange(5)).tolist() == [0, 100, 200, 400, 600]
    batch = run.step_tokens()
    assert batch is not None
    assert batch.values.tolist() == [100, 100, 200, 200]
    # every third step logged
    sparse = Run("sparse", {"train/tokens": Curve(np.array([0, 3, 6]), np.array([512.0, 2048.0, 3584.0]))})
    assert sparse.tokens_after(np.array([1, 2, 4, 7])).tolist() == [512, 1024, 2048, 3584]
    assert sparse.step_tokens().values.tolist() == [512, 512, 512]
    assert Run("log.txt", {}).tokens_after(np.array([2])).tolist() == [1048576]


def test_settings_are_named_as_the_command_line_takes_them():
    config = yaml.safe_load(
        "{model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0e-3, betas: [0.9, 0.95]}},"
        " init_from: null}, trainer: {max_steps: 10, detect_anomaly: false}, callbacks: {}}"
    )
    assert flat(config) == {
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": "0.001",
        "model.optimizer.betas": "[0.9, 0.95]",
        "model.init_from": "null",
        "trainer.max_steps": "10",
        "trainer.detect_anomaly": "false",
        "callbacks": "{}",
    }


def test_of_several_runs_the_settings_that_differ():
    one, two = _run("one", **{"data.seed": "1", "run_dir": "a"}), _run("two", **{"data.seed": "2", "run_dir": "b"})
    assert settings([one, two]) == {"data.seed": ["1", "2"]}
    assert settings([one]) == {"model.config.vocab_size": ["50304"], "data.seed": ["1"]}
    other = Run("three", one.curves, configs=[one.config | {"model.optimizer.lr": "0.1"}])
    assert settings([one, other]) == {"model.optimizer.lr": ["–", "0.1"]}


def test_hellaswag_has_its_rows_and_their_standard_error():
    # sqrt(0.2955 · 0.7045 / 10041) and sqrt(0.25 · 0.75 / 47)
    assert figures(_run())["hellaswag/acc_norm"] == "0.2955 ± 0.0046 (n = 10,042, Rowan/hellaswag)"
    assert standard_error(np.array([0.25]), 48)[0] == pytest.approx(0.063161, abs=1e-6)
    silent = Run("old", _run().curves)
    assert hellaswag_set(silent, "hellaswag") == ("", None)
    assert figures(silent)["hellaswag/acc_norm"] == "0.2955 (n not recorded)"


def test_what_a_run_has_reached():
    run = _run(**{"trainer.max_steps": "8"})
    timed = Run(run.name, run.curves, run.texts, [Start(0, 3600, 0, 1), Start(9000, 1800, 2, 3)], run.configs)
    assert figures(timed) == {
        "val/loss": "5.5000 (after 4 steps)",
        "train/loss": "5.0000 (mean of the last 1 logged steps)",
        "hellaswag/acc_norm": "0.2955 ± 0.0046 (n = 10,042, Rowan/hellaswag)",
        "steps": "4 of 8",
        "tokens": "600",
        "time": "1.50 h, evaluations and all",
    }


def test_losses_of_different_vocabularies_are_not_drawn_together():
    runs = [_run("bpe"), _run("bytes", vocab_size="256"), _run("unpadded", vocab_size="50257")]
    (said,) = compare(runs)
    assert "bytes has another vocabulary than bpe" in said
    drawn = {panel.title: [run.name for run in of.values()] for panel, of in panels(runs)}
    assert drawn["Loss, the whole run"] == ["bpe", "unpadded"]
    assert drawn["Batch size"] == ["bpe", "bytes", "unpadded"]
    assert "5.5000" in page(runs)  # the figures are told of each


def test_a_run_that_did_not_record_its_vocabulary_is_told():
    (said,) = compare([_run("bytes", vocab_size="256"), replace(_run("log"), configs=[])])
    assert "log has another vocabulary than bytes (model.config.vocab_size=not recorded)" in said


def test_the_same_run_twice_is_no_error(tmp_path):
    _write(tmp_path, {"train/loss": {0: 5.0, 1: 4.0}})
    assert main(["report", str(tmp_path), str(tmp_path)]) == 0


def test_losses_of_different_text_are_told():
    (said,) = compare([_run("a", **{"data.source": "stdlib"}), _run("b", **{"data.source": "fineweb-edu"})])
    assert said == "b is on fineweb-edu and a on stdlib: their losses are of different text"


def _baselines(run: Run, title: str) -> list[tuple[str, str]]:
    """(label, style of the line) of the lines across a chart."""
    from gpt2_lightning.tools.charts import draw_panel

    panel, of = next((panel, of) for panel, of in panels([run]) if panel.title == title)
    ax = draw_panel(panel, of).axes[0]
    lines = [line.get_linestyle() for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    return list(zip([text.get_text() for text in ax.texts], lines, strict=True))


def test_gpt2s_lines_are_plain_only_where_they_are_of_the_same_text_and_questions():
    title = "Loss, the whole run"
    assert _baselines(_run(**{"data.source": "fineweb-edu"}), title) == [("GPT-2 124M 3.2924", "-")]
    assert _baselines(_run(**{"data.source": "stdlib"}), title) == [("GPT-2 124M 3.2924\non FineWeb-EDU", ":")]
    assert _baselines(_run(vocab_size="256", **{"data.source": "stdlib"}), title) == []
    title, names = "HellaSwag acc_norm", ("GPT-2 124M 0.2955", "GPT-3 124M 0.337", "GPT-2 XL 0.4893")
    assert _baselines(_run(), title) == [*((name, "-") for name in names), ("chance 0.25", "-")]
    few = Run("few", _run().curves, {"hellaswag/examples": {0: "builtin, 48 rows"}})
    assert _baselines(few, title)[:3] == [(f"{name}\non 10,042 rows", ":") for name in names]


def test_samples_at_the_beginning_the_middle_and_the_end():
    texts = {step: f"    text {step}\n      more\n\n---\n\n    second" for step in (0, 10, 20, 30, 40)}
    found = samples(Run("run", {}, {"samples": texts}))
    assert [step for step, _ in found] == [0, 20, 40]
    assert found[1][1] == "text 20\n  more\n\n---\n\nsecond"
    assert samples(Run("run", {})) == []


class _Outline(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_a_run_says():
    evil = '<script>alert("&")</script>'
    run = _run(evil, **{"data.source": evil, "samples.prompt": evil})
    run = Run(evil, run.curves, run.texts | {"samples": {0: evil}}, [Start(0, 1, 0, 3)], run.configs)
    text = page([run, _run("two")], [evil])
    outline = _Outline(text)
    assert outline.open == []
    assert "script" not in outline.tags
    assert text.count("&lt;script&gt;") >= 8
    assert len(outline.ids) == len(set(outline.ids)) > 100
    assert all(reference.startswith("#") or reference == "data:," for reference in outline.references)
    assert not re.search(r"url\((?!#chart)", text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert outline.tags.count("title") == 1
    assert text.count('role="img" aria-label="Chart of ') == outline.tags.count("svg") == 4
    assert 'aria-label="Chart of Batch size, against tokens: ' in text


def test_a_run_cut_and_resumed_on_one_page(make_shards, write_recipe, tmp_path, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
    assert main(["fit", "--config", str(recipe)]) == 0
    capsys.readouterr()
    run = tmp_path / "run"
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"wrote {run / 'report.html'} and {run / 'report.png'}\n"
    assert shown.err == ""
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (run / "report.html").read_text()
    assert "<td>6 of 6</td>" in text
    assert "<td>768</td>" in text  # 6 steps of 128 tokens
    assert "<td>went on after 3 steps; trainer.max_steps: 3 → 6</td>" in text
    # two runs, into a folder of their own
    assert main(["fit", "--config", str(recipe), "--run_dir", "other", "--model.optimizer.lr", "0.01"]) == 0
    assert main(["report", str(run), "other", "--out", "new/place"]) == 0
    text = Path("new/place/report.html").read_text()
    assert '<th scope="row">model.optimizer.lr</th><td>0.003</td><td>0.01</td>' in text
    assert "trainer.max_steps" not in text.partition("Settings that differ")[2].partition("Starts")[0]


def test_a_cut_event_file_is_told_and_the_rest_shown(tmp_path, capsys):
    for i in range(2):
        _write(tmp_path, {"train/loss": {3 * i + s: 5.0 for s in range(3)}}, purge_step=3 * i)
    first, second = sorted(tmp_path.glob("events*"))
    for path, cut in ((second, 10), (first, first.stat().st_size - 5)):
        path.write_bytes(path.read_bytes()[:-cut])
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"gpt2 report: {first} ends inside a record")
    assert said[0].endswith("nothing of it is shown")
    assert said[1].endswith("it is shown up to step 4")
    assert read_run(tmp_path).curves["train/loss"].steps.tolist() == [3, 4]
    assert f"<li>{first} ends inside a record" in (tmp_path / "report.html").read_text()


def test_damage_inside_an_event_file(tmp_path):
    _write(tmp_path, {"train/loss": dict.fromkeys(range(9), 5.0)})
    (path,) = tmp_path.glob("events*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = read_run(tmp_path)
    assert 1 <= len(run.curves["train/loss"].steps) < 9
    assert len(run.notes) == 1


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("nothing", "nothing: no such folder: give that of a run, such as runs/quickstart"),
        ("empty", "empty has no TensorBoard events and no log.txt: give the folder of a run, such as runs/quickstart"),
        ("runs", "runs has no TensorBoard events and no log.txt: give runs/a runs/b"),
    ],
)
def test_a_folder_without_a_run_is_one_sentence(there, said, capsys):
    Path("empty").mkdir()
    for name in "ab":
        _write(Path("runs") / name, {"train/loss": {0: 5.0}})
    assert main(["report", there]) == 1
    assert capsys.readouterr().err == f"gpt2 report: error: {said}\n"
    assert main(["report", there, "runs/a"]) == 0  # the other run is shown
    assert capsys.readouterr().err == f"gpt2 report: {said}\n"
    assert Path("runs/a/report.html").exists()


def test_a_log_of_build_nanogpts_alone_is_a_run(capsys):
    Path("log").mkdir()
    Path("log/log.txt").write_text("0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\nnonsense\n250 val 5.9\n")
    run = read_run(Path("log"))
    assert run.curves["val/loss"].values.tolist() == [10.9511, 5.9]
    assert run.tokens_after(run.curves["val/loss"].steps).tolist() == [0, 131072000]
    assert main(["report", "log"]) == 0
    said = "gpt2 report: log has no TensorBoard events: log.txt is shown, in steps of 524288 tokens\n"
    assert capsys.readouterr().err == said


def test_a_config_that_is_none_is_told(tmp_path):
    _write(tmp_path, {"train/loss": {0: 5.0}})
    (tmp_path / "config.yaml").write_text("{")
    (tmp_path / "config_1.yaml").write_text("trainer: {max_steps: 5}")
    run = read_run(tmp_path)
    assert run.config == {"trainer.max_steps": "5"}
    assert run.notes == [f"{tmp_path / 'config.yaml'} is not the config of a run: it is left out"]


def test_numbers_that_are_none_are_left_out(tmp_path):
    losses = {step: math.nan if step % 3 == 0 else math.inf if step % 3 == 1 else 5.0 for step in range(5000)}
    _write(tmp_path, {"train/loss": losses, "train/grad_norm": losses, "val/loss": {0: 5.0, 4: math.nan}})
    assert main(["report", str(tmp_path)]) == 0
    assert "nan (after 4 steps; lowest 5.0000)" in (tmp_path / "report.html").read_text()


def test_a_long_line_keeps_its_spikes():
    y = np.ones(30_000)
    y[[7, 12_345]] = (9.0, -9.0)
    x, kept = _thinned(np.arange(30_000), y)
    assert len(kept) == 2000
    assert (kept.max(), kept.min()) == (9.0, -9.0)
    assert x[[kept.argmax(), kept.argmin()]].tolist() == [7, 12_345]
    assert (np.diff(x) >= 0).all()
    x, middle = _medians(np.arange(30_000), y)
    assert middle.tolist() == [1.0] * 100
    assert x[:2].tolist() == [149.5, 449.5]


def test_neither_torch_nor_lightning_is_imported(tmp_path):
    _write(tmp_path, {"train/loss": {0: 5.0}})
    code = (
        "import sys; from gpt2_lightning.__main__ import main; assert main(['report', sys.argv[1]]) == 0; "
        "print([m for m in ('torch', 'lightning', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_browser_shows_it_without_an_error(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")

    def console(path: Path) -> list[str]:
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --enable-logging=stderr "
            f"--v=0 --dump-dom {path.absolute().as_uri()}"
        )
        done = subprocess.run([browser, *flags.split()], capture_output=True, text=True, timeout=120)
        assert "</html>" in done.stdout, done.stderr
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    Path("broken.html").write_text("<!DOCTYPE html><title>x</title><script>missing()</script>")
    assert console(Path("broken.html")), "this is how an error would be seen"
    Path("page.html").write_text(page([_run("one"), _run("two")], ["a note"]))
    assert console(Path("page.html")) == []
