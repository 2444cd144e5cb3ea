"""``gpt2 bench``: what it reports. How fast anything is, no test asks."""

import json
import shutil
import weakref

import bench_curve
import pytest
import torch
from lightning.pytorch import Trainer

from gpt2_lightning.__main__ import main
from gpt2_lightning.tools import bench

TINY = ["--block_size", "16", "--n_layer", "1", "--n_head", "2", "--n_embd", "8", "--micro_batch_size", "2"]
SHAPE = bench.GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)


def test_json_is_one_object_with_each_rung_and_the_limits(capsys):
    assert main(["bench", "--json", "--rungs", "fp32,tf32,flash,vocab,fused,larger,chunked,trainer", *TINY]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["shape"] == {
        "block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 2, "n_embd": 8, "micro_batch_size": 2
    }  # fmt: skip
    rungs = {rung["name"]: rung for rung in found["rungs"]}
    assert list(rungs) == ["fp32", "tf32", "flash", "vocab", "fused", "larger", "chunked", "trainer"]
    assert rungs["tf32"]["skipped"] == "no TF32 on this device"
    assert rungs["larger"]["skipped"] == "no faster here"
    timed = [rung for rung in found["rungs"] if "skipped" not in rung]
    assert len(timed) == 6
    for rung in timed:
        assert 0 < rung["ms_low"] <= rung["ms"] <= rung["ms_high"]
        assert rung["tokens_per_sec"] == pytest.approx(2 * 16 / rung["ms"] * 1000)
        assert rung["times_faster"] == pytest.approx(timed[0]["ms"] / rung["ms"])
        assert rung["micro_batch_size"] == 2
        assert rung["mfu"] is None  # a CPU's peak is not known
    assert (rungs["fp32"]["a100_ms"], rungs["fused"]["a100_ms"], rungs["trainer"]["a100_ms"]) == (1000, 90, None)
    assert found["limits"]["matmul_flops"] > 0
    assert found["limits"]["copy_bytes_per_sec"] > 0
    assert "the same in the Trainer" in shown.err  # the table, for whoever watches


def test_the_table_has_a_line_for_each_rung_and_the_videos_figure(capsys):
    assert main(["bench", "--rungs", "fp32,tf32", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu: block_size=16")
    assert lines[2].startswith("fp32")
    assert lines[2].endswith("1000 ms")
    assert lines[3].endswith("skipped: no TF32 on this device")
    assert lines[4].startswith("limits: a large matmul ")


def test_rungs_add_up_whatever_is_timed(monkeypatch):
    seen = {}

    def record(setup, config, micro_batch_size, device):
        seen[len(seen)] = (setup, config.vocab_size)
        return [1.0] * 4

    monkeypatch.setattr(bench, "_by_hand", record)
    monkeypatch.setattr(bench, "cannot", lambda rung, *_: "not here" if rung.name in ("tf32", "compile") else None)
    climbed = list(bench.climb(SHAPE, 2, torch.device("cpu"), ["fp32", "compile", "flash", "fused"]))
    assert [timing for _, timing in climbed if isinstance(timing, str)] == ["not here"]
    assert list(seen.values()) == [
        (bench.Setup(), 50257),
        (bench.Setup(bf16=True, flash=True), 50257),
        (bench.Setup(bf16=True, flash=True, padded=True, fused=True), 50304),
    ]


def test_a_rung_on_trial_is_left_out_of_those_above(monkeypatch):
    seen = []

    def record(setup, config, micro_batch_size, device):
        seen.append((setup.cudnn, setup.autotune, setup.larger, micro_batch_size))
        return [1.0] * 4

    monkeypatch.setattr(bench, "_by_hand", record)
    monkeypatch.setattr(bench, "_in_the_trainer", record)
    monkeypatch.setattr(bench, "cannot", lambda rung, *_: None)
    list(bench.climb(SHAPE, 2, torch.device("cpu"), ["fused", "larger", "cudnn", "autotune", "trainer"]))
    assert seen == [
        (False, False, False, 2),
        (False, False, True, 8),
        (True, False, True, 8),
        (False, True, True, 8),
        (False, False, True, 8),
    ]


def test_too_little_memory_halves_the_micro_batch_and_says_so(monkeypatch, capsys):
    tried, alive = [], []

    class Activations:
        """Something large in the frame that runs out of memory."""

    def short_of_memory(setup, config, micro_batch_size, device):
        activations = Activations()
        alive.append(weakref.ref(activations))
        assert all(earlier() is None for earlier in alive[:-1]), "still there when the half is tried"
        tried.append(micro_batch_size)
        if micro_batch_size > (0 if setup.flash else 2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB")
        return [0.5] * 4

    monkeypatch.setattr(bench, "_by_hand", short_of_memory)
    assert main(["bench", "--json", "--rungs", "fp32,flash", *TINY, "--micro_batch_size", "10"]) == 0
    shown = capsys.readouterr()
    fp32, flash = json.loads(shown.out)["rungs"]
    assert tried == [10, 5, 2, 10, 5, 2, 1]
    assert fp32["micro_batch_size"] == 2
    assert fp32["tokens_per_sec"] == 2 * 16 / 0.5
    assert flash["skipped"] == "does not fit"
    lines = shown.err.splitlines()
    assert lines[2].endswith("micro-batch 2")
    assert lines[3].endswith("skipped: does not fit")


def test_another_error_is_no_matter_of_memory(monkeypatch):
    def broken(*args):
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(bench, "_by_hand", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        list(bench.climb(SHAPE, 2, torch.device("cpu"), ["fp32"]))


def test_the_trainers_rung_has_what_fit_has(monkeypatch, make_shards, write_recipe):
    """The types of callbacks, loggers and plugins, as the Trainer has them, and Lightning's settings."""
    seen = []
    run = Trainer._run  # `fit` itself is read by the command line, for its arguments

    def note(trainer, *args, **kwargs):
        seen.append(trainer)
        return run(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_run", note)
    assert main(["fit", "--config", str(write_recipe(make_shards()))]) == 0
    assert main(["bench", "--json", "--rungs", "trainer", *TINY]) == 0
    theirs, ours = seen
    of_the_cli, of_the_bench = {"SaveConfig", "Dashboard"}, {"_Stopwatch"}  # they write at start and at validations
    names = [[type(callback).__name__ for callback in trainer.callbacks] for trainer in seen]
    assert set(names[0]) - of_the_cli == set(names[1]) - of_the_bench
    assert [type(logger) for logger in theirs.loggers] == [type(logger) for logger in ours.loggers]
    for name in ("gradient_clip_val", "log_every_n_steps", "num_sanity_val_steps"):
        assert getattr(theirs, name) == getattr(ours, name)


def test_wrong_flags_are_usage_errors(capsys):
    for wrong, part in (
        (["--rungs", "fp32,warp"], "no rung warp: choose from fp32,tf32"),
        (["--n_embd", "0"], "n_embd"),
        (["--device", "tpu"], "no device tpu here: choose from "),
    ):
        assert main(["bench", *wrong]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 2
        assert part in error[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named_with_those_that_are(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda", *TINY]) == 2
    assert capsys.readouterr().err.splitlines()[1] == "gpt2 bench: error: no device cuda here: choose from cpu"
    assert main(["bench", "--device", "cpu", "--rungs", "fp32", *TINY]) == 0
    assert capsys.readouterr().out.startswith("cpu: ")


def test_the_curves_of_bench_curve_are_compared_against_bf16s_own_noise():
    exact, noisy = [4.0, 3.0, 2.0], [4.01, 3.0, 1.98]
    assert bench_curve.losses("0 val 4.1\n0 train 4.000000\n1 train 3.0\n1 hella 0.25\n") == [4.0, 3.0]
    assert bench_curve.distance(exact, noisy) == pytest.approx((0.01, 0.02))
    assert bench_curve.within_noise(exact, noisy, [4.02, 3.01, 2.03])
    assert not bench_curve.within_noise(exact, noisy, [4.0, 3.05, 2.0])  # one step too far
    assert not bench_curve.within_noise(exact, noisy, [4.025, 3.025, 2.025])  # too far in the mean
    with pytest.raises(ValueError, match="zip"):
        bench_curve.within_noise(exact, noisy, exact[:2])  # a run that ended early


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_the_first_losses_compiled_in_bf16_are_those_of_eager_fp32(make_shards, write_recipe, capfd):
    recipe = str(write_recipe(make_shards()))
    assert bench_curve.main(20, recipe) == 0, capfd.readouterr().out
    assert "of 20 steps" in capfd.readouterr().out
