"""``gpt2 report``: a run's folder as plain data, its charts, and a page that stands alone."""

import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from gpt2_lightning.errors import UserError
from gpt2_lightning.tools.charts import draw_charts, panels
from gpt2_lightning.tools.report import compare, figures, page, samples, settings, starts, write_report
from gpt2_lightning.tools.runs import Curve, Run, Start, flat, read_run


def write_events(folder: Path, points: dict[str, dict[int, float]], samples: dict[int, str] | None = None) -> Path:
    """One event file, as one start of a run writes it."""
    earlier = set(folder.glob("events*"))
    with SummaryWriter(str(folder), filename_suffix=f".start{len(earlier)}") as writer:
        for tag, values in points.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)
        for step, text in (samples or {}).items():
            writer.add_text("samples", text, step)
    (written,) = set(folder.glob("events*")) - earlier
    return written


def make_run(name: str = "one", vocab_size: str = "50304", examples: str = "hub, 10042 examples", **config: str) -> Run:
    curves = {
        "train/loss": Curve(np.arange(4), np.array([10.0, 8.0, 6.0, 5.0])),
        "train/tokens": Curve(np.arange(4), np.array([100.0, 200.0, 400.0, 600.0])),
        "val/loss": Curve(np.array([0, 4]), np.array([11.0, 5.5])),
        "hellaswag/acc_norm": Curve(np.array([0, 4]), np.array([0.25, 0.2955])),
    }
    texts = {"hellaswag/examples": {0: examples}}
    run_starts = [Start(0, 3600, 0, 1), Start(9000, 1800, 2, 3)]
    return Run(name, curves, texts, run_starts, [{"model.config.vocab_size": vocab_size} | config])


def test_several_starts_are_one_curve(tmp_path):
    first = {"train/loss": {0: 9, 1: 8, 2: 7, 3: 6, 4: 5}, "val/loss": {0: 9.5, 2: 8.5, 4: 7.5}}
    write_events(tmp_path, first, {0: "a", 2: "b", 4: "c"})
    write_events(tmp_path, {"train/loss": {2: 70, 3: 60}})  # resumed after 2 steps, killed before the next validation
    run = read_run(tmp_path)
    assert run.curves["val/loss"].steps.tolist() == [0, 2]  # that at 2 came before the checkpoint
    assert run.texts["samples"] == {0: "a", 2: "b"}
    write_events(tmp_path, {"train/loss": {2: 7.25, 3: 6.25}, "val/loss": {4: 7.25}})
    run = read_run(tmp_path)
    assert run.curves["train/loss"].steps.tolist() == [0, 1, 2, 3]
    assert run.curves["train/loss"].values.tolist() == [9, 8, 7.25, 6.25]
    assert run.curves["val/loss"].values.tolist() == [9.5, 8.5, 7.25]
    assert [(start.first_step, start.last_step) for start in run.starts] == [(0, 4), (2, 3), (2, 3)]
    assert [what for _, _, what in starts(run)] == ["", *2 * ["resumed after 2 steps; repeated 3 steps"]]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty"])
def test_a_damaged_event_file_is_read_up_to_the_damage(tmp_path, damage):
    write_events(tmp_path, {"train/loss": dict.fromkeys(range(4), 5.0)})
    path = write_events(tmp_path, {"train/loss": dict.fromkeys(range(4, 100), 4.0)})
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: {"truncated": len(data) // 2, "flipped bit": len(data), "empty": 0}[damage]])
    steps = read_run(tmp_path).curves["train/loss"].steps
    assert steps.tolist() == list(range(len(steps)))
    assert len(steps) == 4 if damage == "empty" else 40 < len(steps) < 60


def test_tokens_are_interpolated_between_logged_steps():
    assert make_run().tokens_after(np.arange(5)).tolist() == [0, 100, 200, 400, 600]
    every_third = Run("sparse", {"train/tokens": Curve(np.array([0, 3, 6]), np.array([512.0, 2048.0, 3584.0]))})
    assert every_third.tokens_after(np.array([1, 2, 4, 7])).tolist() == [512, 1024, 2048, 3584]


def test_a_log_txt_alone_is_a_run(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\nnonsense\n250 val nan\n")
    run = read_run(tmp_path)
    assert run.curves["val/loss"].values.tolist() == pytest.approx([10.9511, math.nan], nan_ok=True)
    assert run.tokens_after(run.curves["val/loss"].steps).tolist() == [0, 131072000]  # 250 · 524,288


def test_a_folder_without_a_run_is_refused_with_the_runs_in_it(tmp_path):
    with pytest.raises(UserError, match=r"no TensorBoard events and no log.txt: give the folder of a run"):
        read_run(tmp_path)
    for name in "ab":
        write_events(tmp_path / name, {"train/loss": {0: 5.0}})
    with pytest.raises(UserError, match=f"give {tmp_path}/a {tmp_path}/b"):
        read_run(tmp_path)


def test_settings_are_named_as_on_the_command_line():
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


def test_one_run_lists_its_main_settings_and_several_those_that_differ():
    one = make_run("one", **{"data.seed": "1", "run_dir": "a"})
    two = make_run("two", **{"data.seed": "2", "run_dir": "b", "model.optimizer.lr": "0.1"})
    assert settings([one]) == {"model.config.vocab_size": ["50304"], "data.seed": ["1"]}
    assert settings([one, two]) == {"data.seed": ["1", "2"], "model.optimizer.lr": ["–", "0.1"]}


def test_figures_of_a_run():
    assert figures(make_run(**{"trainer.max_steps": "8"})) == {
        "val/loss": "5.5000 (after 4 steps)",
        "train/loss": "5.0000 (mean of the last 1 logged steps)",
        "hellaswag/acc_norm": "0.2955 ± 0.0046 (10,042 examples, hub)",  # sqrt(0.2955 · 0.7045 / 10041)
        "steps": "4 of 8",
        "tokens": "600",
        "time": "1:30:00 with evaluation",
    }
    assert figures(make_run(examples=""))["hellaswag/acc_norm"] == "0.2955"


def test_losses_of_another_vocabulary_are_not_drawn_beside_the_first():
    runs = [make_run("bpe"), make_run("bytes", vocab_size="256"), make_run("unpadded", vocab_size="50257")]
    (note,) = compare(runs)
    assert "bytes has another vocabulary than bpe" in note
    drawn = {panel.title: [run.name for run in of.values()] for panel, of in panels(runs)}
    assert drawn["Loss"] == ["bpe", "unpadded"]
    assert drawn["HellaSwag"] == ["bpe", "bytes", "unpadded"]


def test_losses_of_different_text_are_noted():
    (note,) = compare([make_run("a", **{"data.source": "stdlib"}), make_run("b", **{"data.source": "fineweb-edu"})])
    assert note == "b was trained on fineweb-edu and a on stdlib: their losses are of different text"


@pytest.mark.parametrize(
    ("run", "title", "label", "style"),
    [
        (make_run(**{"data.source": "fineweb-edu"}), "Loss", "GPT-2 124M 3.2924", "-"),
        (make_run(**{"data.source": "stdlib"}), "Loss", "GPT-2 124M 3.2924\non FineWeb-EDU", ":"),
        (make_run(), "HellaSwag", "GPT-3 124M 0.337", "-"),
        (make_run(examples="builtin, 48 examples"), "HellaSwag", "GPT-3 124M 0.337\non 10,042 examples", ":"),
    ],
)
def test_references_are_solid_lines_only_on_the_same_text_and_examples(run, title, label, style):
    ax = next(ax for ax in draw_charts([run]).axes if ax.get_title("left") == title)
    styles = [line.get_linestyle() for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    lines = dict(zip([text.get_text() for text in ax.texts], styles, strict=True))
    assert lines[label] == style


def test_another_vocabulary_has_no_reference_loss():
    loss, late_loss, *_ = draw_charts([make_run(vocab_size="256")]).axes
    assert (len(loss.texts), len(late_loss.texts)) == (0, 0)


def test_samples_are_those_of_the_beginning_the_middle_and_the_end():
    texts = {step: f"    text {step}\n      more\n\n---\n\n    second" for step in (0, 10, 20, 30, 40)}
    found = samples(Run("run", {}, {"samples": texts}))
    assert [step for step, _ in found] == [0, 20, 40]
    assert found[1][1] == "text 20\n  more\n\n---\n\nsecond"
    assert samples(Run("run", {})) == []


class Outline(HTMLParser):
    """Collects tags and links of a page and checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_runs_contain():
    evil = '<script>alert("&")</script>'
    run = make_run(evil, **{"data.source": evil, "samples.prompt": evil})
    run.texts["samples"] = {0: evil}
    text = page([run, make_run("two")], b"PNG", [evil])
    outline = Outline(text)
    assert outline.open == []
    assert "script" not in outline.tags
    assert text.count("&lt;script&gt;") >= 8
    assert outline.links == ["data:,", "data:image/png;base64,UE5H"]
    assert "url(" not in text


def test_values_that_are_not_finite_and_equal_names_are_drawn(tmp_path):
    losses = {step: (math.nan, math.inf, 5.0)[step % 3] for step in range(500)}
    points = {"train/loss": losses, "train/grad_norm": losses, "val/loss": {0: 5.0, 4: math.nan}}
    folders = [tmp_path / name / "$x$" for name in "ab"]
    for folder in folders:
        write_events(folder, points)
    path, notes = write_report(folders, tmp_path / "out")
    assert (path.parent / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "nan (after 4 steps; lowest 5.0000)" in path.read_text()
    assert str(folders[1]) in path.read_text()
    assert notes == []
