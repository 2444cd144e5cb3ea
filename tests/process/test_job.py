"""``gpt2 fit`` as whole processes: signals, a folder that two jobs want, a disk that is full."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from gpt2_lightning import load
from gpt2_lightning.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals, RLIMIT_FSIZE and /proc are POSIX"),
]
STEPS = 4000  # many more than pass until a signal arrives
SCHEDULE = {
    "class_path": "gpt2_lightning.schedule.WarmupCosine",
    "init_args": {"warmup_steps": 2, "max_steps": STEPS, "min_lr": 3e-4},
}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture
def recipe(make_shards, write_recipe):
    """A run that goes on for minutes, with a validation on the way and no checkpoint but the one at its end."""
    return write_recipe(
        make_shards(),
        trainer={"max_steps": STEPS},
        model={"lr_scheduler": SCHEDULE},
        validation={"every_n_steps": 7},
        checkpoint={"every_n_steps": 100_000},
    )


def _start(recipe: Path, *flags: str, **environment: str) -> "subprocess.Popen[str]":
    """``gpt2 fit`` in a session of its own, so that a signal to its group reaches all its processes and no other.

    It has as many threads as this process: they decide how sums round.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2_lightning", "fit", "--config", str(recipe), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
    )


def _wait_for_steps(process: "subprocess.Popen[str]", count: int, run: str = "run") -> None:
    """Until the run has logged ``count`` lines more than it had."""
    log = Path(run) / "log.txt"

    def lines() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    known = lines()
    while lines() < known + count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _ranks(process: "subprocess.Popen[str]") -> list[int]:
    """Process numbers of the ranks that Lightning's launcher started beside rank 0."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"  # a zombie is one that has ended
    except FileNotFoundError:
        return False


def _end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _steps_of(checkpoint: str) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def _assert_as_if_never_cut(recipe: Path, read_scalars, stopped: int, *flags: str) -> None:
    """Three steps more, against the run that made them all in one go."""
    end = ["--trainer.max_steps", str(stopped + 3), *flags]
    assert main(["fit", "--config", str(recipe), *end]) == 0
    assert main(["fit", "--config", str(recipe), *end, "--run_dir", "whole"]) == 0
    cut, whole = read_scalars(Path("run")), read_scalars(Path("whole"))
    for tag in ("train/loss", "train/grad_norm", "train/lr", "train/tokens", "val/loss"):
        assert cut[tag] == whole[tag], tag
    weights = [load(f"{run}/checkpoints/last.ckpt").state_dict() for run in ("run", "whole")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_the_run_at_a_step_and_the_next_start_goes_on(number, recipe, read_scalars):
    # to the whole group, as a terminal and SLURM send it: the reader processes must not die of it
    process = _start(recipe, "--data.num_workers", "2")
    _wait_for_steps(process, 20)
    os.killpg(process.pid, number)
    code, out, err = _end(process)
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert "last.ckpt" in os.listdir("run/checkpoints")
    assert len(os.listdir("run/checkpoints")) <= 3, (
        "it saved more than once"
    )  # last, its step, best if one was measured
    stopped = _steps_of("run/checkpoints/last.ckpt")
    assert f"{number.name}: stopped after step {stopped}; the same command goes on" in out
    _assert_as_if_never_cut(recipe, read_scalars, stopped)


def test_a_second_interrupt_ends_at_once(recipe):
    process = _start(recipe, "--data.total_batch_tokens", str(2**20))  # a step of many seconds
    log = Path("run/log.txt")
    while not (log.exists() and "0 val" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == 130
    assert os.listdir("run/checkpoints") == []


@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_of_two_ranks_stops_both(which, recipe):
    process = _start(recipe, *TWO)
    _wait_for_steps(process, 10)
    ranks = [process.pid, *_ranks(process)]
    assert len(ranks) == 2
    os.kill(ranks[which], signal.SIGTERM)
    code, out, err = _end(process)
    assert code == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert out.count("SIGTERM: stopped after step") == 1
    assert not _alive(ranks[1])
    stopped = _steps_of("run/checkpoints/last.ckpt")
    code, out, err = _end(_start(recipe, *TWO, "--trainer.max_steps", str(stopped + 2)))
    assert code == 0, err
    assert f"at step {stopped}" in out


def test_torchrun_without_a_strategy_is_refused_and_said_once(recipe):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, "-m", "gpt2_lightning", "fit", "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("gpt2 fit: error: torchrun started 2 processes") == 1, done.stderr
    assert "give --trainer.devices 2 --trainer.num_nodes 1 --trainer.strategy ddp" in done.stderr


def test_slurm_gets_its_job_back_into_the_queue(recipe, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    for number, asked in ((signal.SIGTERM, ""), (signal.SIGUSR1, "requeue 12_3\n")):
        process = _start(
            recipe, PATH=path, SLURM_JOB_ID="14", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3", SLURM_PROCID="0"
        )
        _wait_for_steps(process, 5)
        os.kill(process.pid, number)
        assert _end(process)[0] == 128 + number
        assert (tmp_path / "asked").exists() == bool(asked)
    assert (tmp_path / "asked").read_text() == asked


def test_two_jobs_in_one_folder(recipe):
    process = _start(recipe, "--data.num_workers", "2")
    _wait_for_steps(process, 3)
    code, _, err = _end(_start(recipe))
    assert code == 1
    assert err.strip() == (
        f"gpt2 fit: error: another `gpt2 fit` is running in {Path('run').absolute()}: wait until it has ended, or "
        "choose another run_dir"
    )
    process.kill()
    process.wait()
    # the lock dies with its process, though reader processes may outlive it by seconds
    code, _, err = _end(_start(recipe, "--trainer.max_steps", "1"))
    assert code == 0, err


FULL = """
import resource, signal, sys
from gpt2_lightning.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a checkpoint of this model has 110 kB
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(recipe, read_scalars):
    shm = "/dev/shm"  # a temporary folder on another file system must not matter, where there is one
    environment = {"TMPDIR": shm} if Path(shm).is_dir() else {}
    args = ["fit", "--config", str(recipe), "--checkpoint.every_n_steps", "2", "--validation.every_n_steps", "2"]
    code, _, err = _end(_start(recipe, *args[3:], "--trainer.max_steps", "2", **environment))
    assert code == 0, err
    before = {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()}
    full = subprocess.run(
        [sys.executable, "-c", FULL, *args], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert full.returncode == 1, full.stderr
    said = full.stderr.strip().splitlines()[-1]
    assert said.startswith("gpt2 fit: error: ")
    assert "step_000004.ckpt cannot be written (File too large): make room" in said
    assert "Traceback" not in full.stderr
    assert {path: path.read_bytes() for path in Path("run/checkpoints").iterdir()} == before
    _assert_as_if_never_cut(recipe, read_scalars, 4, *args[3:])


class CountBroadcasts(Callback):
    """Prints how often the ranks broadcast while they train."""

    def on_train_start(self, trainer, pl_module):
        self.count, broadcast = 0, torch.distributed.broadcast

        def counted(*args, **kwargs):
            self.count += 1
            return broadcast(*args, **kwargs)

        torch.distributed.broadcast = counted

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            print("broadcasts:", self.count)


def test_no_micro_batch_waits_for_the_other_ranks(recipe):
    # Lightning alone asks them before each of the 4 · 4 micro-batches; we at the end of a step, by an all-reduce
    flags = ["--data.micro_batch_size", "1", "--trainer.max_steps", "4", "--validation.every_n_steps", "0"]
    process = _start(
        recipe, *TWO, *flags, "--trainer.callbacks+=test_job.CountBroadcasts", PYTHONPATH=str(Path(__file__).parent)
    )
    code, out, err = _end(process)
    assert code == 0, err
    assert "broadcasts: 0" in out
