"""``gpt2 bench``: which steps it times and what it reports, not how fast they are."""

import io

import bench_curve
import pytest
import torch

from gpt2_lightning.model import GPTConfig
from gpt2_lightning.tools import bench

TINY = GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch):
    """The real measurement takes seconds."""
    monkeypatch.setattr(bench, "limits", lambda *_, **__: {"matmul_flops": 1e9, "copy_bytes_per_sec": 2e9})


def no_trainer(*args, **kwargs):
    raise AssertionError("no rung needs a trainer")


def test_rungs_keep_the_changes_of_the_used_ones_before_them():
    missing = ("tf32", "compile", "memory")
    setups = {rung.name: setup for rung, setup in bench.ladder(lambda rung: rung.name not in missing)}
    assert setups["fp32"] == {"fp32"}
    assert setups["tf32"] is None
    assert setups["bf16"] == {"fp32", "bf16"}
    assert setups["larger"] == {"fp32", "bf16", "flash", "vocab", "fused", "larger"}
    assert setups["matmuls"] == {"fp32", "bf16", "vocab", "fused", "larger", "chunked", "matmuls"}
    assert setups["trainer"] == setups["matmuls"] | {"trainer"}
    compiled = {rung.name for rung, setup in bench.ladder(lambda rung: True) if "compile" in setup}
    assert compiled == {"compile", "flash", "vocab", "fused", "larger"}  # the chunked loss is not


def test_every_step_after_the_warmup_is_timed():
    plain = bench.time_plain_steps(frozenset(), TINY, 2, CPU)
    changed = bench.time_plain_steps(frozenset({"flash", "fused", "chunked"}), TINY, 2, CPU)
    assert len(plain) == len(changed) == bench.TIMED_STEPS


def test_result_and_table(monkeypatch):
    monkeypatch.setattr(bench, "time_plain_steps", lambda setup, *_: [0.5 if "flash" in setup else 1.0] * 4)
    table = io.StringIO()
    found = bench.measure(TINY, 2, CPU, ["fp32", "tf32", "flash"], table, no_trainer)
    fp32, tf32, flash = found["rungs"]
    assert fp32 == {
        "name": "fp32",
        "title": "fp32, attention as matmuls",
        "a100_ms": 1000.0,
        "micro_batch_size": 2,
        "ms": 1000.0,
        "peak_memory_bytes": None,  # CUDA only
        "tokens_per_sec": 32.0,
        "times_faster": 1.0,
        "mfu": None,  # a CPU's peak is not known
    }
    assert (flash["tokens_per_sec"], flash["times_faster"]) == (64.0, 2.0)
    assert tf32["skipped"] == "not used on this device"
    assert found["shape"]["micro_batch_size"] == 2
    # FLOPs per token: 6 · (12·8² block weights + 50304·8 of the head) + 6·8·16 for causal attention
    assert found["limits"]["share_of_matmul"] == pytest.approx(64 * 2_419_968 / 1e9)
    lines = table.getvalue().splitlines()
    assert lines[0].startswith("cpu: block_size=16")
    assert lines[2].startswith("fp32")
    assert lines[2].endswith("1000 ms")
    assert lines[3].endswith("skipped: not used on this device")
    assert lines[5].startswith("limits: a large matmul 0.001 TFLOP/s, a large copy 2 GB/s")


def test_a_rung_that_runs_out_of_memory_is_skipped(monkeypatch):
    def time_steps(setup, config, micro_batch_size, device):
        if "flash" not in setup:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB")
        return [0.5] * 4

    monkeypatch.setattr(bench, "time_plain_steps", time_steps)
    fp32, flash = bench.measure(TINY, 10, CPU, ["fp32", "flash"], io.StringIO(), no_trainer)["rungs"]
    assert fp32["skipped"] == "a micro-batch of 10 does not fit"
    assert (flash["ms"], flash["times_faster"]) == (500.0, 1.0)


def test_other_errors_are_raised(monkeypatch):
    def broken(*args):
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(bench, "time_plain_steps", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        bench.measure(TINY, 2, CPU, ["fp32"], io.StringIO(), no_trainer)


def test_bench_curve_compares_losses_with_the_noise_of_bf16():
    exact, noisy = [4.0, 3.0, 2.0], [4.01, 3.0, 1.98]
    assert bench_curve.losses("0 val 4.1\n0 train 4.000000\n1 train 3.0\n1 hella 0.25\n") == [4.0, 3.0]
    assert bench_curve.distance(exact, noisy) == pytest.approx((0.01, 0.02))
    assert bench_curve.within_noise(exact, noisy, [4.02, 3.01, 2.03])
    assert not bench_curve.within_noise(exact, noisy, [4.0, 3.05, 2.0])  # one step too far
    assert not bench_curve.within_noise(exact, noisy, [4.025, 3.025, 2.025])  # too far in the mean
    with pytest.raises(ValueError, match="zip"):
        bench_curve.within_noise(exact, noisy, exact[:2])  # a run that ended early
