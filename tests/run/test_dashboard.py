"""What TensorBoard is given beside the scalars, through several starts of one run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG, parse_experiment_plugin_data
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as parse_start

from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.dashboard import published
from gpt2_lightning.tools.runs import read_run

SHAPE = {"block_size": 64, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}


def test_settings_scores_and_yardsticks_of_one_run_in_one_place(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(),
        model={"config": SHAPE},
        data={"micro_batch_size": 2},
        hellaswag={"every_n_steps": 6, "path": "builtin"},
        checkpoint={"every_n_steps": 2},
    )
    for steps in ("2", "4", "6"):  # one run, started three times
        assert main(["fit", "--config", str(recipe), "--trainer.max_steps", steps]) == 0
    cut_run = tmp_path / "run"
    assert len(list(cut_run.rglob("events.out.tfevents.*"))) == 3  # one of each start, and no run below it
    events = EventAccumulator(str(cut_run)).Reload()
    experiment = parse_experiment_plugin_data(events.SummaryMetadata(EXPERIMENT_TAG).plugin_data.content)
    assert [metric.name.tag for metric in experiment.metric_infos] == ["val/loss", "hellaswag/acc_norm"]
    start = parse_start(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    settings = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert settings.items() >= {
        "lr": 0.003, "warmup_steps": 2, "min_lr": 0.0003, "total_batch_tokens": 128, "n_layer": 1, "vocab_size": 50304,
        "optimizer": "gpt2_lightning.optim.AdamW", "order": "sequential", "seed_everything": 1337,
    }.items()  # fmt: skip

    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    (category,) = layout.category
    assert [list(chart.multiline.tag) for chart in category.chart] == [
        ["train/loss$", "val/loss$", "yardstick/val_loss/"],
        ["hellaswag/acc_norm$", "yardstick/hellaswag_10042_rows/"],
    ]

    logged = read_scalars(cut_run)
    yardsticks = {tag: values for tag, values in logged.items() if tag.startswith("yardstick/")}
    assert list(yardsticks) == [
        f"yardstick/hellaswag_10042_rows/{name}" for name in ("GPT-2_124M", "GPT-3_124M", "GPT-2_XL")
    ]
    assert all(list(values) == list(logged["val/loss"]) for values in yardsticks.values())
    assert [values[0] for values in yardsticks.values()] == pytest.approx([0.2955, 0.337, 0.4893])

    # build-nanogpt's notebook takes log.txt apart so
    streams: dict[str, dict[int, float]] = {}
    for line in (cut_run / "log.txt").read_text().splitlines():
        step, stream, value = line.split()
        streams.setdefault(stream, {})[int(step)] = float(value)
    assert set(streams) == {"train", "val", "hella"}
    for stream, tag in (("train", "train/loss"), ("val", "val/loss"), ("hella", "hellaswag/acc_norm")):
        assert streams[stream] == pytest.approx(logged[tag], abs=1e-4)

    # and the report knows how many questions HellaSwag has
    run = read_run(cut_run)
    assert run.texts["hellaswag/examples"] == {0: "builtin, 48 rows"}
    assert main(["report", str(cut_run)]) == 0
    text = (cut_run / "report.html").read_text()
    assert "(n = 48, builtin)" in text
    assert text.count("went on after") == 2


def test_the_loss_has_a_yardstick_on_its_own_text_only():
    assert published("fineweb-edu", []) == {"yardstick/val_loss/GPT-2_124M": 3.2924}
    assert published("stdlib", []) == {}
    assert published(None, ["hellaswag_harness"]) == {
        "yardstick/hellaswag_harness_10042_rows/GPT-2_124M": 0.3114,
        "yardstick/hellaswag_harness_10042_rows/GPT-2_XL": 0.5089,
    }
