"""One run: killed at any moment and started again, alone or with peers, its curve is that of a run never cut."""

import contextlib
import itertools
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

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import (
    EXACT,
    PATIENCE,
    assert_close_curves,
    assert_same_run,
    await_exit,
    commands,
    descendants,
    fork,
    free_port,
    kill_group,
    live_processes,
    read_log,
    run_gpt2,
    wait_until,
)

from gpt2_lightning.data.shards import read_manifest, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]


# -- one process -------------------------------------------------------------------------------------------------------


class Victim:
    """A run that is started again and again by the same command, and the phase that it was in when it was killed."""

    validate_every, save_every = 4, 2

    def __init__(self, command: list[str], data: Path, run: Path, output: Path) -> None:
        self.command, self.data, self.run, self.output = command, data, run, output
        self.random = random.Random(0)
        self.hits: Counter[str] = Counter()
        self.killed: int | None = None  # the last one

    def shards(self) -> int:
        return len(list(self.data.glob("*.npy")))

    def configs(self) -> int:
        return len(list(self.run.glob("config*.yaml")))

    def half_written(self) -> set[tuple[str, int]]:
        folder = self.run / "checkpoints"
        found = set()
        for path in folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def bury(self, killed: int | None) -> None:
        """What the one before left has been beside a whole start by now: that is enough."""
        if self.killed is not None:
            kill_group(self.killed)
        self.killed = killed

    def kill(self, aim: str) -> None:
        """One start, killed at a random moment in or near the phase that is aimed at."""
        shards, configs, lines, written = self.shards(), self.configs(), len(read_log(self.run)), self.half_written()
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

        moments: dict[str, tuple[Callable[[], bool], float]] = {
            "preparation": (lambda: self.shards() > shards, 0.015),
            "resuming": (lambda: self.configs() > configs, 0.3),
            "first_step": (lambda: len(steps()) > 0, 0.0),
            "step": (lambda: len(steps()) > 1 + turn and not validates(), 0.03),
            "validation": (lambda: validates() == turn, 0.02),
            "checkpoint": (lambda: len(steps()) >= 4 * turn - 2 and not self.half_written() <= written, 0.01),
        }
        event, within = moments[aim]
        process = fork(self.command, self.output)
        wait_until(event, process.is_alive, self.output)
        time.sleep(self.random.uniform(0, within))
        process.kill()
        assert await_exit(process) == -signal.SIGKILL, f"it was too fast to be killed: {self.output.read_text()}"
        self.bury(process.pid)

        manifest = read_manifest(self.data)
        assert manifest is not None
        if not manifest.complete:
            phase = "preparation"
        elif not self.half_written() <= written:
            phase = "checkpoint"
        elif not steps():
            phase = "resuming" if resumes else "starting"
        elif validates():
            phase = "validation"
        else:
            phase = "first_step" if len(steps()) == 1 else "step"
        self.hits[phase] += 1


@pytest.mark.parametrize(
    ("workers", "steps", "documents", "wanted"),
    [
        (0, 120, 2300, {"preparation": 6, "resuming": 4, "first_step": 4, "step": 5, "validation": 6, "checkpoint": 5}),
        (2, 48, 300, {"resuming": 1, "first_step": 2, "step": 1, "validation": 1, "checkpoint": 1}),
    ],
    ids=["30 kills", "two workers"],
)
def test_killed_in_every_phase_it_is_the_run_never_cut(
    workers, steps, documents, wanted, write_recipe, read_scalars, tmp_path
):
    rng = random.Random(0)
    corpus = tmp_path / "corpus.jsonl"  # ≈ 1,200 tokens a document
    texts = (" ".join(f"{rng.getrandbits(24):x}" for _ in range(300)) for _ in range(documents))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def command(name: str, *more: str) -> list[str]:
        recipe = write_recipe(
            tmp_path / f"{name}-data",
            name=name,
            trainer={"max_steps": steps},
            model={"config": {"block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 2, "n_embd": 16}},
            data={
                "root": str(tmp_path / f"{name}-data"),
                "source": str(corpus),
                "order": "shuffled",
                "num_workers": workers if name == "cut" else 0,
            },
            validation={"every_n_steps": Victim.validate_every, "tokens": 128},
            checkpoint={"every_n_steps": Victim.save_every},
            run_dir=str(tmp_path / name),
        )
        return ["fit", "--config", str(recipe), *more]

    def prepare(name: str) -> list[str]:  # in small shards, which `fit` then goes on with
        return ["prepare", "--source", str(corpus), "--out", str(tmp_path / f"{name}-data"), "--shard_tokens", "20000"]

    output = tmp_path / "whole.txt"
    # with fewer checkpoints: they too have no influence on the curve
    for whole in (prepare("whole"), command("whole", "--checkpoint.every_n_steps", "50")):
        assert await_exit(fork(whole, output)) == 0, output.read_text()

    victim = Victim(prepare("cut"), tmp_path / "cut-data", tmp_path / "cut", tmp_path / "cut.txt")
    victim.kill("preparation")
    victim.hits.clear()  # it was `prepare`: what counts is `fit`
    victim.command = command("cut")
    while missing := {phase: n - victim.hits[phase] for phase, n in wanted.items() if n > victim.hits[phase]}:
        assert victim.hits.total() < 3 * sum(wanted.values()), f"some phases are never hit: {victim.hits}"
        choices = list(missing) if "preparation" not in missing else ["preparation"]
        victim.kill(victim.random.choice(choices))
        for old in sorted((tmp_path / "cut" / "checkpoints").glob("step_*.ckpt"))[:-3]:
            old.unlink()  # as a user who is short of disk
    assert victim.hits.total() >= sum(wanted.values())

    assert await_exit(fork(victim.command, victim.output)) == 0, victim.output.read_text()[-3000:]
    victim.bury(None)
    assert_same_run(victim.run, tmp_path / "whole", read_scalars, steps)
    assert verify(victim.data).shards == verify(tmp_path / "whole-data").shards


def _slow_to_log(args: list[str], output: Path) -> None:
    """In a new process: ``gpt2 ARGS`` with a slow disk under TensorBoard, killed as soon as step 4 is saved."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, replace = RecordWriter.write, os.replace

    def slow_write(self: RecordWriter, data: bytes) -> None:
        time.sleep(0.1)
        write(self, data)

    def deadly_replace(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "last.ckpt" and Path(target).with_name("step_000004.ckpt").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    RecordWriter.write, os.replace = slow_write, deadly_replace
    run_gpt2(args, output)


def test_what_was_logged_before_a_checkpoint_is_on_disk_with_it(make_shards, write_recipe, read_scalars, tmp_path):
    output = tmp_path / "output.txt"
    recipe = write_recipe(make_shards(), checkpoint={"every_n_steps": 2}, validation={"every_n_steps": 2})
    command = ["fit", "--config", str(recipe)]
    assert await_exit(fork([*command, "--run_dir", str(tmp_path / "whole")], output)) == 0, output.read_text()
    assert await_exit(fork(command, output, _slow_to_log)) == -signal.SIGKILL, output.read_text()
    assert await_exit(fork(command, output)) == 0, output.read_text()
    assert [step for word, step, _ in read_log(tmp_path / "run") if word == "train"] == [0, 1, 2, 3, 4, 5]
    assert_same_run(tmp_path / "run", tmp_path / "whole", read_scalars, 6)


# -- several processes -------------------------------------------------------------------------------------------------

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def _schedule(steps: int) -> dict[str, Any]:
    """A learning rate whose end does not move with the step at which a part of the run stops."""
    init_args = {"warmup_steps": 2, "max_steps": steps, "min_lr": 3e-4}
    return {"lr_scheduler": {"class_path": "gpt2_lightning.schedule.WarmupCosine", "init_args": init_args}}


def test_one_process_then_two_then_one_is_one_curve(make_shards, write_recipe, read_scalars, tmp_path):
    output = tmp_path / "output.txt"
    recipe = write_recipe(
        make_shards(),
        model=_schedule(24),
        trainer={"max_steps": 24},
        data={"order": "shuffled"},
        validation={"every_n_steps": 4},
        checkpoint={"every_n_steps": 8},
    )
    command = ["fit", "--config", str(recipe)]
    alone, elastic = (["--run_dir", str(tmp_path / name)] for name in ("alone", "elastic"))
    assert await_exit(fork([*command, *alone], output)) == 0, output.read_text()
    assert await_exit(fork([*command, *elastic, "--trainer.max_steps", "8"], output)) == 0, output.read_text()
    two = ["-m", "gpt2_lightning", *command, *elastic, "--trainer.max_steps", "16", *TWO]
    with commands(output, two) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()
    assert await_exit(fork([*command, *elastic], output)) == 0, output.read_text()
    steps = [step for word, step, _ in read_log(tmp_path / "elastic") if word == "train"]
    assert steps == list(range(24))  # each once: it went on where it had stopped
    assert_close_curves(tmp_path / "elastic", tmp_path / "alone", read_scalars, 24)


EXAMPLE = itertools.count()


@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([3, 2]),
    B=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    doublings=st.integers(0, 1),
    order=st.sampled_from(["shuffled", "sequential"]),
    windows=st.integers(3, 20),
    begun=st.integers(0, 3),
)
def test_any_number_of_processes_goes_on_with_one_process_s_curve(
    world_size, B, accumulate, doublings, order, windows, begun, make_shards, write_recipe, read_scalars, tmp_path
):
    """Of ``begun`` steps by one process; validation windows that the others cannot share evenly among them."""
    name, steps, T = f"example{next(EXAMPLE)}", 6, 16
    start = world_size * B * accumulate * T
    recipe = write_recipe(
        make_shards(name=f"{name}-data"),
        name=name,
        trainer={"max_steps": steps},
        model=_schedule(steps),
        data={
            "order": order,
            "total_batch_tokens": start << doublings,
            "batch_size_schedule": {"start_tokens": start, "ramp_tokens": 2.5 * start} if doublings else None,
            "micro_batch_size": B << doublings,
        },
        validation={"every_n_steps": 2, "tokens": windows * T},
    )
    alone, elastic, output = tmp_path / f"{name}-alone", tmp_path / name, tmp_path / f"{name}.txt"
    command = ["fit", "--config", str(recipe), "--run_dir"]
    assert await_exit(fork([*command, str(alone)], output)) == 0, output.read_text()
    if begun:
        first = [*command, str(elastic), "--trainer.max_steps", str(begun), "--validation.every_n_steps", "0"]
        assert await_exit(fork(first, output)) == 0, output.read_text()
    many = ["--trainer.devices", str(world_size), "--trainer.strategy", "ddp"]
    with commands(output, ["-m", "gpt2_lightning", *command, str(elastic), *many]) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()[-3000:]
    ours, theirs = read_scalars(elastic), read_scalars(alone)
    assert list(theirs["train/tokens"].values())[-1] == sum([start] * 3 + [2 * start] * 3 if doublings else [start] * 6)
    for tag in EXACT:
        missed = [step for step in theirs[tag] if step < begun and tag == "val/loss"]
        assert [*missed, *ours[tag]] == list(theirs[tag]), tag
        expected = [value for step, value in theirs[tag].items() if step not in missed]
        np.testing.assert_allclose(list(ours[tag].values()), expected, rtol=1e-5, err_msg=tag)


def test_two_nodes_under_torchrun_train_as_one_process_does(make_shards, write_recipe, read_scalars, tmp_path):
    output = tmp_path / "output.txt"
    recipe = write_recipe(
        make_shards(), trainer={"max_steps": 4}, validation={"every_n_steps": 2}, data={"micro_batch_size": 8}
    )
    command = ["fit", "--config", str(recipe)]
    assert await_exit(fork([*command, "--run_dir", str(tmp_path / "alone")], output)) == 0, output.read_text()
    for devices, micro_batch_size in (1, 4), (1, 2), (2, 1):  # of the step's 8 sequences: at once, or accumulated
        run = tmp_path / f"{devices}x{micro_batch_size}"
        split = ["--trainer.num_nodes", "2", "--trainer.devices", str(devices), "--trainer.strategy", "ddp"]
        split += ["--data.micro_batch_size", str(micro_batch_size), "--run_dir", str(run)]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(devices)]
        torchrun += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        program = ["-m", "gpt2_lightning", *command, *split]
        nodes = [[*torchrun, "--node_rank", str(rank), *program] for rank in (0, 1)]
        with commands(output, *nodes) as processes:
            for process in processes:
                assert process.wait(PATIENCE) == 0, output.read_text()[-5000:]
        assert_close_curves(run, tmp_path / "alone", read_scalars, 4)


def test_when_ranks_die_nobody_hangs_and_the_run_goes_on(make_shards, write_recipe, read_scalars, tmp_path):
    steps = 500
    output = tmp_path / "output.txt"
    recipe = write_recipe(
        make_shards(),
        trainer={"max_steps": steps},
        model={"config": {"block_size": 16, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}},
        data={"order": "shuffled"},
        validation={"every_n_steps": 40},
        checkpoint={"every_n_steps": 20},
    )
    program = ["-m", "gpt2_lightning", "fit", "--config", str(recipe), *TWO]
    with commands(output, [*program, "--run_dir", str(tmp_path / "whole")]) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()[-3000:]

    run = tmp_path / "cut"
    program += ["--run_dir", str(run)]
    for doomed, more in ([0], 0), ([0], 50), ([1], 50), ([0, 1], 50):  # the first before the two have met
        before = len(read_log(run))
        with commands(output, program) as (first,):
            wait_until(lambda: descendants(first.pid), lambda: first.poll() is None, output)
            if more:
                wait_until(lambda: len(read_log(run)) > before + more, lambda: first.poll() is None, output)  # noqa: B023
            ranks = [first.pid, *descendants(first.pid)]
            assert len(ranks) == 2
            for rank in doomed:
                os.kill(ranks[rank], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while left := [pid for pid in ranks if first.poll() is None or pid in live_processes()]:
                assert time.monotonic() < deadline, f"rank {doomed} was killed and {left} hang: {output.read_text()}"
                time.sleep(0.2)
            assert first.returncode != 0
    with commands(output, program) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()[-3000:]
    assert_same_run(run, tmp_path / "whole", read_scalars, steps)
