"""``gpt2 bench``: what it reports. How fast anything is, no test asks."""

import json

import pytest
import torch

from gpt2_lightning import bench
from gpt2_lightning.__main__ import main

TINY = ["--block_size", "16", "--n_layer", "1", "--n_head", "2", "--n_embd", "8", "--micro_batch_size", "2"]


def test_json_is_one_object_with_each_rung_and_the_limits(capsys):
    assert main(["bench", "--json", "--rungs", "fp32,tf32,flash,vocab,fused,chunked,trainer", *TINY]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["shape"] == {
        "block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 2, "n_embd": 8, "micro_batch_size": 2
    }  # fmt: skip
    rungs = {rung["name"]: rung for rung in found["rungs"]}
    assert list(rungs) == ["fp32", "tf32", "flash", "vocab", "fused", "chunked", "trainer"]
    assert rungs["tf32"]["skipped"] == "no TF32 on this device"
    timed = [rung for rung in found["rungs"] if "skipped" not in rung]
    assert len(timed) == 6
    for rung in timed:
        assert 0 < rung["ms_low"] <= rung["ms"] <= rung["ms_high"]
        assert rung["tokens_per_sec"] == pytest.approx(2 * 16 / rung["ms"] * 1000)
        assert rung["times_faster"] == pytest.approx(timed[0]["ms"] / rung["ms"])
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
    monkeypatch.setattr(bench, "cannot", lambda rung, device: "not here" if rung.name in ("tf32", "compile") else None)
    config, device = bench.GPTConfig(16, 50304, 1, 1, 8), torch.device("cpu")
    climbed = list(bench.climb(config, 2, device, ["fp32", "compile", "flash", "fused"]))
    assert [timing for _, timing in climbed if isinstance(timing, str)] == ["not here"]
    assert list(seen.values()) == [
        (bench.Setup(), 50257),
        (bench.Setup(bf16=True, flash=True), 50257),
        (bench.Setup(bf16=True, flash=True, padded=True, fused=True), 50304),
    ]


def test_wrong_flags_are_usage_errors(capsys):
    for wrong, part in (
        (["--rungs", "fp32,warp"], "no rung warp: choose from fp32,tf32"),
        (["--n_embd", "0"], "n_embd"),
    ):
        assert main(["bench", *wrong]) == 2
        assert part in capsys.readouterr().err
