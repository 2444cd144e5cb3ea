"""The commands ``plan``, ``bench`` and ``report`` as a user runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bench_curve
import pytest
from lightning.pytorch import Trainer

from gpt2_lightning.__main__ import main
from gpt2_lightning.tools import bench

TINY = ["--block_size", "16", "--n_layer", "1", "--n_head", "2", "--n_embd", "8", "--micro_batch_size", "2"]


def test_plan_takes_the_overrides_of_fit_and_runs_nothing(write_recipe, make_shards, capsys):
    args = ["plan", "--config", str(write_recipe(make_shards())), "--trainer.max_steps", "10"]
    assert main([*args, "--model.config.n_layer=3", "--data.micro_batch_size=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["tokens"], found["accumulate_grad_batches"]) == (10, 1280, 4)
    assert found["shape"]["n_layer"] == 3
    assert (found["data_tokens"], found["epochs"]) == (20_000, 0.064)
    assert found["step"]["chunked_loss"]  # as fit does on a CPU
    assert main([*args, "--gpu", "h100", "--mfu", "0.25"]) == 0
    assert "assuming an MFU of 25% of 989 TFLOP/s" in capsys.readouterr().out
    assert not Path("run").exists()


def test_plan_refuses_what_fit_refuses(refused, write_recipe, make_shards):
    args = ["plan", "--config", str(write_recipe(make_shards()))]
    refused([*args, "--trainer.strategy", "fsdp"], "fully_shard")
    refused([*args, "--trainer.precision", "bf16-true"], "bf16-mixed")


def test_bench_prints_one_json_object_and_the_table_on_stderr(capsys):
    names = ["fp32", "tf32", "trainer"]
    assert main(["bench", "--json", "--rungs", ",".join(names), *TINY]) == 0
    shown = capsys.readouterr()
    rungs = json.loads(shown.out)["rungs"]
    assert [rung["name"] for rung in rungs] == names
    timed = [rung for rung in rungs if "skipped" not in rung]
    assert len(timed) == 2
    for rung in timed:
        assert rung["ms"] > 0
        assert rung["tokens_per_sec"] == pytest.approx(2 * 16 / rung["ms"] * 1000)
    assert "the same in the Trainer" in shown.err
    assert json.loads(shown.out)["limits"]["matmul_flops"] > 0


def test_the_trainer_rung_has_the_callbacks_loggers_and_settings_of_fit(monkeypatch, make_shards, write_recipe):
    trainers = []
    run = Trainer._run  # LightningCLI reads the signature of Trainer.fit

    def record(trainer, *args, **kwargs):
        trainers.append(trainer)
        return run(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_run", record)
    monkeypatch.setattr(bench, "limits", lambda *_, **__: {"matmul_flops": 1e9, "copy_bytes_per_sec": 1e9})
    assert main(["fit", "--config", str(write_recipe(make_shards()))]) == 0
    assert main(["bench", "--json", "--rungs", "trainer", *TINY]) == 0
    of_fit, of_bench = trainers
    names = [{type(callback).__name__ for callback in trainer.callbacks} for trainer in trainers]
    assert names[0] - {"SaveConfig", "Dashboard"} == names[1] - {"StepTimes"}
    assert [type(logger) for logger in of_fit.loggers] == [type(logger) for logger in of_bench.loggers]
    for name in ("gradient_clip_val", "log_every_n_steps", "num_sanity_val_steps"):
        assert getattr(of_fit, name) == getattr(of_bench, name)


def test_report_of_a_resumed_run_and_of_two_runs(make_shards, write_recipe, tmp_path, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
    assert main(["fit", "--config", str(recipe)]) == 0
    capsys.readouterr()
    run = tmp_path / "run"
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'} and {run / 'report.png'}\n"
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (run / "report.html").read_text()
    assert "<td>6 of 6</td>" in text
    assert "<td>768</td>" in text  # 6 steps of 128 tokens
    assert "<td>resumed after 3 steps; trainer.max_steps: 3 → 6</td>" in text
    assert main(["fit", "--config", str(recipe), "--run_dir", "other", "--model.optimizer.lr", "0.01"]) == 0
    assert main(["report", str(run), "other", "--out", "new/place"]) == 0
    text = Path("new/place/report.html").read_text()
    assert '<th scope="row">model.optimizer.lr</th><td>0.003</td><td>0.01</td>' in text
    assert "trainer.max_steps" not in text.partition("Settings that differ")[2].partition("Starts")[0]


def test_report_imports_neither_torch_nor_lightning():
    Path("log.txt").write_text("0 train 5.0\n")
    code = (
        "import sys; from gpt2_lightning.__main__ import main; assert main(['report', '.']) == 0; "
        "print([m for m in ('torch', 'lightning', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_the_first_losses_compiled_in_bf16_are_those_of_eager_fp32(make_shards, write_recipe, capfd):
    recipe = str(write_recipe(make_shards()))
    assert bench_curve.main(20, recipe) == 0, capfd.readouterr().out
    assert "of 20 steps" in capfd.readouterr().out
