"""``gpt2 fit`` as a job: signals to its processes, SLURM's queue, two jobs in one folder, torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from processes import TWO_DEVICES, assert_same_run, descendants, live_processes, read_log, saved_step

from gpt2_lightning.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")]
STEPS = 4000  # many more than pass until a signal arrives
SCHEDULE = {
    "class_path": "gpt2_lightning.schedule.WarmupCosine",
    "init_args": {"warmup_steps": 2, "max_steps": STEPS, "min_lr": 3e-4},
}


@pytest.fixture
def recipe(make_shards, write_recipe) -> Path:
    """A run of minutes, with validations, and no checkpoint but the one at its end."""
    return write_recipe(
        make_shards(),
        trainer={"max_steps": STEPS},
        model={"lr_scheduler": SCHEDULE},
        validation={"every_n_steps": 7},
        checkpoint={"every_n_steps": 100_000},
    )


def _start(recipe: Path, *flags: str, **environment: str) -> "subprocess.Popen[str]":
    """``gpt2 fit`` in a session of its own, so that a signal to its group reaches all its processes and no other."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2_lightning", "fit", "--config", str(recipe), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # as many threads as this process: they decide how sums round
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
    )


def _wait_for_lines(process: "subprocess.Popen[str]", count: int) -> None:
    """Until log.txt has ``count`` lines more than now."""
    count += len(read_log(Path("run")))
    while len(read_log(Path("run"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_the_group_saves_one_checkpoint_and_the_run_resumes_exactly(number, recipe, read_scalars):
    process = _start(recipe, "--data.num_workers", "2")  # a terminal and SLURM signal the workers too
    _wait_for_lines(process, 20)
    os.killpg(process.pid, number)
    code, out, err = _end(process)
    assert code == 128 + number, err
    assert "Traceback" not in err
    stopped = saved_step(Path("run"))
    assert f"{number.name}: stopped after step {stopped}" in out
    assert len(list(Path("run/checkpoints").glob("step_*"))) == 1
    end = ["--trainer.max_steps", str(stopped + 3)]
    assert main(["fit", "--config", str(recipe), *end]) == 0
    assert main(["fit", "--config", str(recipe), *end, "--run_dir", "whole"]) == 0
    assert_same_run(Path("run"), Path("whole"), read_scalars, stopped + 3)


def test_a_second_ctrl_c_ends_at_once(recipe):
    process = _start(recipe, "--data.total_batch_tokens", str(2**20))  # a step of many seconds
    _wait_for_lines(process, 1)  # the validation before it
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == 130
    assert os.listdir("run/checkpoints") == []


def test_a_signal_to_one_rank_stops_all_at_the_same_step(recipe):
    process = _start(recipe, *TWO_DEVICES)
    _wait_for_lines(process, 10)
    (other,) = descendants(process.pid)
    os.kill(other, signal.SIGTERM)
    code, out, err = _end(process)
    assert code == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert out.count("SIGTERM: stopped after step") == 1
    assert other not in live_processes()
    stopped = saved_step(Path("run"))
    code, out, err = _end(_start(recipe, *TWO_DEVICES, "--trainer.max_steps", str(stopped + 2)))
    assert code == 0, err
    assert f"at step {stopped}" in out


def test_torchrun_without_a_strategy_is_refused_by_one_message(recipe):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, "-m", "gpt2_lightning", "fit", "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("gpt2 fit: error: ") == 1, done.stderr
    assert "--trainer.devices 2 --trainer.num_nodes 1 --trainer.strategy ddp" in done.stderr


def test_slurm_requeues_a_job_at_its_time_limit_but_not_one_that_was_cancelled(recipe, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}
    for number, asked in ((signal.SIGTERM, ""), (signal.SIGUSR1, "requeue 12_3\n")):
        process = _start(recipe, PATH=f"{scontrol.parent}:{os.environ['PATH']}", **slurm)
        _wait_for_lines(process, 5)
        os.kill(process.pid, number)
        assert _end(process)[0] == 128 + number
        assert (tmp_path / "asked").exists() == bool(asked)
    assert (tmp_path / "asked").read_text() == asked


def test_a_second_job_in_a_run_folder_is_refused_until_the_first_has_ended(recipe):
    process = _start(recipe, "--data.num_workers", "2")
    _wait_for_lines(process, 3)
    code, _, err = _end(_start(recipe))
    assert code == 1
    assert str(Path("run").absolute()) in err
    assert "run_dir" in err
    process.kill()
    process.wait()
    # the lock is gone with its process, though its workers may outlive it by seconds
    code, _, err = _end(_start(recipe, "--trainer.max_steps", "1"))
    assert code == 0, err


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
    # Lightning alone broadcasts before each of the 4 · 4 micro-batches; we all-reduce at the end of a step
    flags = ["--data.micro_batch_size", "1", "--trainer.max_steps", "4", "--validation.every_n_steps", "0"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = _start(recipe, *TWO_DEVICES, *flags, "--trainer.callbacks+=test_job.CountBroadcasts", PYTHONPATH=path)
    code, out, err = _end(process)
    assert code == 0, err
    assert "broadcasts: 0" in out
