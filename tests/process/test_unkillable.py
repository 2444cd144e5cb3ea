"""A run that is killed at any moment and started again, alone or on several processes, equals an uninterrupted run."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import (
    TIMEOUT,
    TWO_DEVICES,
    assert_close_curves,
    assert_same_run,
    await_exit,
    commands,
    descendants,
    fork,
    kill_group,
    live_processes,
    read_log,
    run_gpt2,
    wait_until,
)

from gpt2_lightning.data.shards import read_manifest, verify

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")]
TINY = {"block_size": 16, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}


# -- one process -------------------------------------------------------------------------------------------------------


class Victim:
    """A run that is started again and again, and a count of the phases in which it was killed."""

    validate_every, save_every = 4, 2

    def __init__(self, data: Path, run: Path, output: Path) -> None:
        self.data, self.run, self.output = data, run, output
        self.random = random.Random(0)
        self.kills: Counter[str] = Counter()
        self.last_killed: int | None = None

    def half_written(self) -> set[tuple[str, int]]:
        found = set()
        for path in (self.run / "checkpoints").glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def kill_workers(self, killed: int | None = None) -> None:
        """Workers of the process before the last one have run beside a whole start by now, which is enough."""
        if self.last_killed is not None:
            kill_group(self.last_killed)
        self.last_killed = killed

    def kill(self, command: list[str], aim: str) -> None:
        """Starts the command and kills it at a random moment in or near the phase that is aimed at."""
        lines, half_written = len(read_log(self.run)), self.half_written()
        shards, configs = set(self.data.glob("*.npy")), set(self.run.glob("config*.yaml"))
        resumes = (self.run / "checkpoints" / "last.ckpt").exists()
        turn = self.random.randint(1, 2)

        def steps() -> list[int]:
            """The steps that this start has logged."""
            return [step for word, step, _ in read_log(self.run)[lines:] if word == "train"]

        def validates() -> int:
            """Which validation of this start is under way, counted from 1; 0 for none."""
            new = read_log(self.run)[lines:]
            due = [step + 1 for word, step, _ in new if word == "train" and (step + 1) % self.validate_every == 0]
            return len(due) if due and new[-1][:2] == ("train", due[-1] - 1) else 0

        moments: dict[str, tuple[Callable[[], bool], float]] = {  # what to wait for, and up to how many seconds more
            "preparation": (lambda: not set(self.data.glob("*.npy")) <= shards, 0.015),
            "resuming": (lambda: not set(self.run.glob("config*.yaml")) <= configs, 0.3),
            "first_step": (lambda: len(steps()) > 0, 0.0),
            "step": (lambda: len(steps()) > 1 + turn and not validates(), 0.03),
            "validation": (lambda: validates() == turn, 0.02),
            "checkpoint": (lambda: len(steps()) >= 4 * turn - 2 and not self.half_written() <= half_written, 0.01),
        }
        event, within = moments[aim]
        process = fork(command, self.output)
        wait_until(event, process.is_alive, self.output)
        time.sleep(self.random.uniform(0, within))
        process.kill()
        assert await_exit(process) == -signal.SIGKILL, f"it ended before it was killed: {self.output.read_text()}"
        self.kill_workers(process.pid)

        manifest = read_manifest(self.data)
        assert manifest is not None
        if not manifest.complete:
            phase = "preparation"
        elif not self.half_written() <= half_written:
            phase = "checkpoint"
        elif not steps():
            phase = "resuming" if resumes else "starting"
        elif validates():
            phase = "validation"
        else:
            phase = "first_step" if len(steps()) == 1 else "step"
        self.kills[phase] += 1


def test_a_run_killed_in_every_phase_equals_an_uninterrupted_run(write_recipe, read_scalars, tmp_path):
    steps, rng = 72, random.Random(0)
    wanted = {"preparation": 3, "resuming": 2, "first_step": 2, "step": 3, "validation": 3, "checkpoint": 3}
    corpus = tmp_path / "corpus.jsonl"  # ≈ 1,200 tokens a document
    texts = (" ".join(f"{rng.getrandbits(24):x}" for _ in range(300)) for _ in range(1000))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def fit(name: str) -> list[str]:
        recipe = write_recipe(
            tmp_path / f"{name}-data",
            name=name,
            trainer={"max_steps": steps},
            model={"config": TINY | {"vocab_size": 50304}},
            data={"source": str(corpus), "order": "shuffled"},
            validation={"every_n_steps": Victim.validate_every, "tokens": 128},
            checkpoint={"every_n_steps": Victim.save_every},
            run_dir=str(tmp_path / name),
        )
        return ["fit", "--config", str(recipe)]

    def prepare(name: str) -> list[str]:  # into small shards, which `fit` then continues with
        return ["prepare", "--source", str(corpus), "--out", str(tmp_path / f"{name}-data"), "--shard_tokens", "20000"]

    output = tmp_path / "whole.txt"
    # with fewer checkpoints: they have no influence on the curve
    for whole in (prepare("whole"), [*fit("whole"), "--checkpoint.every_n_steps", "50"]):
        assert await_exit(fork(whole, output)) == 0, output.read_text()

    victim = Victim(tmp_path / "cut-data", tmp_path / "cut", tmp_path / "cut.txt")
    victim.kill(prepare("cut"), "preparation")
    victim.kills.clear()
    command = fit("cut")
    while missing := [phase for phase, n in wanted.items() if n > victim.kills[phase]]:
        assert victim.kills.total() < 3 * sum(wanted.values()), f"some phases are never hit: {victim.kills}"
        aim = "preparation" if "preparation" in missing else victim.random.choice(missing)
        victim.kill([*command, "--data.num_workers", victim.random.choice(["0", "0", "2"])], aim)

    assert await_exit(fork(command, victim.output)) == 0, victim.output.read_text()[-3000:]
    victim.kill_workers()
    assert_same_run(victim.run, tmp_path / "whole", read_scalars, steps)
    assert verify(victim.data).shards == verify(tmp_path / "whole-data").shards


def _log_slowly(args: list[str], output: Path) -> None:
    """In a new process: ``gpt2 ARGS`` with a slow disk for TensorBoard, killed as soon as step 4 is saved."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, replace = RecordWriter.write, os.replace

    def slow_write(self: RecordWriter, data: bytes) -> None:
        time.sleep(0.1)
        write(self, data)

    def replace_and_die(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "last.ckpt" and Path(target).with_name("step_000004.ckpt").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    RecordWriter.write, os.replace = slow_write, replace_and_die
    run_gpt2(args, output)


def test_all_that_was_logged_before_a_checkpoint_is_on_disk_when_it_is_saved(
    make_shards, write_recipe, read_scalars, tmp_path
):
    output = tmp_path / "output.txt"
    recipe = write_recipe(make_shards(), checkpoint={"every_n_steps": 2}, validation={"every_n_steps": 2})
    command = ["fit", "--config", str(recipe)]
    assert await_exit(fork([*command, "--run_dir", str(tmp_path / "whole")], output)) == 0, output.read_text()
    assert await_exit(fork(command, output, _log_slowly)) == -signal.SIGKILL, output.read_text()
    assert await_exit(fork(command, output)) == 0, output.read_text()
    assert [step for word, step, _ in read_log(tmp_path / "run") if word == "train"] == [0, 1, 2, 3, 4, 5]
    assert_same_run(tmp_path / "run", tmp_path / "whole", read_scalars, 6)


# -- several processes -------------------------------------------------------------------------------------------------


def _schedule(steps: int) -> dict[str, Any]:
    """A learning rate that does not depend on the step at which a part of the run stops."""
    init_args = {"warmup_steps": 2, "max_steps": steps, "min_lr": 3e-4}
    return {"lr_scheduler": {"class_path": "gpt2_lightning.schedule.WarmupCosine", "init_args": init_args}}


def test_one_process_then_two_then_one_make_one_curve(make_shards, write_recipe, read_scalars, tmp_path):
    alone, elastic, output = tmp_path / "alone", tmp_path / "elastic", tmp_path / "output.txt"
    recipe = write_recipe(
        make_shards(),
        model=_schedule(24),
        trainer={"max_steps": 24},
        data={"order": "shuffled"},
        validation={"every_n_steps": 4},
        checkpoint={"every_n_steps": 8},
    )
    command = ["fit", "--config", str(recipe), "--run_dir"]
    assert await_exit(fork([*command, str(alone)], output)) == 0, output.read_text()
    command.append(str(elastic))
    assert await_exit(fork([*command, "--trainer.max_steps", "8"], output)) == 0, output.read_text()
    two = ["-m", "gpt2_lightning", *command, "--trainer.max_steps", "16", *TWO_DEVICES]
    with commands(output, two) as (process,):
        assert process.wait(TIMEOUT) == 0, output.read_text()
    assert await_exit(fork(command, output)) == 0, output.read_text()
    steps = [step for word, step, _ in read_log(elastic) if word == "train"]
    assert steps == list(range(24))  # each once: it resumed where it had stopped
    assert_close_curves(elastic, alone, read_scalars, 24)


def test_three_processes_continue_a_growing_batch_and_share_validation_unevenly(
    make_shards, write_recipe, read_scalars, tmp_path
):
    alone, elastic, output = tmp_path / "alone", tmp_path / "elastic", tmp_path / "output.txt"
    start = 3 * 2 * 2 * 16  # processes · micro-batch · accumulation · block_size
    recipe = write_recipe(
        make_shards(),
        model=_schedule(6),
        data={
            "order": "shuffled",
            "total_batch_tokens": 2 * start,
            "batch_size_schedule": {"start_tokens": start, "ramp_tokens": 2.5 * start},
            "micro_batch_size": 4,
        },
        validation={"every_n_steps": 2, "tokens": 7 * 16},  # 7 sequences on 3 processes
    )
    command = ["fit", "--config", str(recipe), "--run_dir"]
    assert await_exit(fork([*command, str(alone)], output)) == 0, output.read_text()
    first = [*command, str(elastic), "--trainer.max_steps", "2", "--validation.every_n_steps", "0"]
    assert await_exit(fork(first, output)) == 0, output.read_text()
    three = ["--trainer.devices", "3", "--trainer.strategy", "ddp"]
    with commands(output, ["-m", "gpt2_lightning", *command, str(elastic), *three]) as (process,):
        assert process.wait(TIMEOUT) == 0, output.read_text()[-3000:]
    assert list(read_scalars(elastic)["train/tokens"].values())[-1] == 3 * start + 3 * 2 * start
    assert_close_curves(elastic, alone, read_scalars, 6, not_validated=[0])


def test_when_a_rank_is_killed_no_rank_hangs_and_the_run_resumes_exactly(
    make_shards, write_recipe, read_scalars, tmp_path
):
    steps, output, run = 300, tmp_path / "output.txt", tmp_path / "cut"
    recipe = write_recipe(
        make_shards(),
        trainer={"max_steps": steps},
        model={"config": TINY},
        data={"order": "shuffled"},
        validation={"every_n_steps": 40},
        checkpoint={"every_n_steps": 20},
    )
    program = ["-m", "gpt2_lightning", "fit", "--config", str(recipe), *TWO_DEVICES, "--run_dir"]
    with commands(output, [*program, str(tmp_path / "whole")]) as (process,):
        assert process.wait(TIMEOUT) == 0, output.read_text()[-3000:]
    program.append(str(run))
    for doomed, after in (0, 0), (0, 50), (1, 50):  # the first before the two have met
        due = after + len(read_log(run))
        with commands(output, program) as (first,):
            wait_until(lambda: descendants(first.pid), lambda: first.poll() is None, output)
            if after:
                wait_until(lambda: len(read_log(run)) > due, lambda: first.poll() is None, output)  # noqa: B023
            ranks = [first.pid, *descendants(first.pid)]
            assert len(ranks) == 2
            os.kill(ranks[doomed], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while left := [pid for pid in ranks if first.poll() is None or pid in live_processes()]:
                assert time.monotonic() < deadline, f"rank {doomed} was killed and {left} hang: {output.read_text()}"
                time.sleep(0.2)
            assert first.returncode != 0
    with commands(output, program) as (process,):
        assert process.wait(TIMEOUT) == 0, output.read_text()[-3000:]
    assert_same_run(run, tmp_path / "whole", read_scalars, steps)
