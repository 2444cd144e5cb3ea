"""One run: killed at any moment and started again, alone or with peers, its curve is that of a run never cut."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2_lightning.__main__ import main
from gpt2_lightning.data.shards import read_manifest, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]

EXACT = {"train/loss", "train/grad_norm", "train/lr", "train/tokens", "val/loss"}  # all that is logged but the speed
PATIENCE = 120.0  # seconds until something that must happen is taken not to happen, on a machine that is busy


# -- processes ---------------------------------------------------------------------------------------------------------


def _gpt2(args: list[str], output: Path) -> None:
    """In a new process: ``gpt2 ARGS``, what it says appended to a file."""
    os.setpgrp()  # so that the workers it leaves behind can be found
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # the server's threads are as the test's environment was when it began
    multiprocessing.set_start_method(None, force=True)  # the data's workers begin as they do in a shell's process
    raise SystemExit(main(args))


def _fork(args: list[str], output: Path, program: Callable[[list[str], Path], None] = _gpt2) -> ForkServerProcess:
    """``gpt2 ARGS`` in a process of its own, which a server forks that has done the imports: it is there at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "gpt2_lightning.cli", "torch.utils.tensorboard"])
    process = context.Process(target=program, args=(args, output))
    process.start()
    return process


def _await_exit(process: ForkServerProcess) -> int | None:
    process.join(PATIENCE)
    return process.exitcode


@contextlib.contextmanager
def _commands(output: Path, *commands: list[str]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Commands of the shell, started together; whatever is left of them at the end is killed."""
    with output.open("ab") as file:
        started = [
            subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            for command in commands
        ]
    try:
        yield started
    finally:
        for process in started:
            for pid in [*_descendants(process.pid), process.pid]:
                _kill(pid)
            process.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _processes() -> dict[int, tuple[int, int]]:
    """The parent and the group of each process that is alive."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX":
                found[int(path.parent.name)] = int(parent), int(group)
    return found


def _descendants(pid: int) -> list[int]:
    alive = _processes()
    found = [pid]
    for parent in found:
        found += [child for child, (its_parent, _) in alive.items() if its_parent == parent]
    return found[1:]


def _kill_group(leader: int) -> None:
    """What is left of a process that was killed: its workers see it within seconds, or never if they had just begun."""
    for pid, (_, group) in _processes().items():
        if group == leader:
            _kill(pid)


def _until(condition: Callable[[], Any], is_alive: Callable[[], bool], output: Path) -> None:
    """Returns as soon as ``condition`` holds; the process that is watched must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert is_alive(), f"it ended before it could be killed:\n{output.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"nothing happens:\n{output.read_text()[-3000:]}"
        time.sleep(0.0005)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def _log(run: Path) -> list[tuple[str, int, str]]:
    """log.txt's lines so far: (train or val, step, value)."""
    path = run / "log.txt"
    text = path.read_text() if path.exists() else ""
    rows = (line.split() for line in text.splitlines())
    return [(word, int(step), value) for step, word, value in rows]


def _curve(run: Path) -> dict[tuple[str, int], str]:
    """log.txt as a reader takes it: of what was done twice, the last."""
    return {(word, step): value for word, step, value in _log(run)}


def _assert_same_run(
    run: Path, expected: Path, read_scalars: Callable[[Path], dict[str, dict[int, float]]], steps: int
) -> None:
    """To the last bit: the curves in TensorBoard's events and in log.txt, the weights, the optimizer's state."""
    ours, theirs = read_scalars(run), read_scalars(expected)
    assert list(theirs["train/loss"]) == list(range(steps))
    assert len(set(theirs["train/loss"].values())) > steps // 2  # steps can be told apart
    for tag in EXACT:
        assert ours[tag] == theirs[tag], tag
    assert _curve(run) == _curve(expected)
    checkpoints = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, expected)]
    assert checkpoints[0]["global_step"] == steps
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(checkpoints[0][part], checkpoints[1][part], rtol=0, atol=0)
    assert not list((run / "checkpoints").glob(".*"))  # nothing half-written is left


def _assert_close_curves(
    run: Path, expected: Path, read_scalars: Callable[[Path], dict[str, dict[int, float]]], steps: int
) -> None:
    """The same steps and validation points, with the same values to rounding."""
    ours, theirs = read_scalars(run), read_scalars(expected)
    assert list(theirs["train/loss"]) == list(range(steps))
    neighbours = np.diff(list(theirs["train/loss"].values()))
    assert np.abs(neighbours).min() > 2e-4  # a step on other samples would show
    for tag in EXACT:
        assert list(ours[tag]) == list(theirs[tag]), tag
        np.testing.assert_allclose(list(ours[tag].values()), list(theirs[tag].values()), rtol=1e-5, err_msg=tag)


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
            _kill_group(self.killed)
        self.killed = killed

    def kill(self, aim: str) -> None:
        """One start, killed at a random moment in or near the phase that is aimed at."""
        shards, configs, lines, written = self.shards(), self.configs(), len(_log(self.run)), self.half_written()
        resumes = (self.run / "checkpoints" / "last.ckpt").exists()
        turn = self.random.randint(1, 2)

        def steps() -> list[int]:
            """The steps that this start has logged."""
            return [step for word, step, _ in _log(self.run)[lines:] if word == "train"]

        def validates() -> int:
            """Which validation of this start is under way, counted from 1; 0 for none."""
            new = _log(self.run)[lines:]
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
        process = _fork(self.command, self.output)
        _until(event, process.is_alive, self.output)
        time.sleep(self.random.uniform(0, within))
        process.kill()
        assert _await_exit(process) == -signal.SIGKILL, f"it was too fast to be killed: {self.output.read_text()}"
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
        assert _await_exit(_fork(whole, output)) == 0, output.read_text()

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

    assert _await_exit(_fork(victim.command, victim.output)) == 0, victim.output.read_text()[-3000:]
    victim.bury(None)
    _assert_same_run(victim.run, tmp_path / "whole", read_scalars, steps)
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
    _gpt2(args, output)


def test_what_was_logged_before_a_checkpoint_is_on_disk_with_it(make_shards, write_recipe, read_scalars, tmp_path):
    output = tmp_path / "output.txt"
    recipe = write_recipe(make_shards(), checkpoint={"every_n_steps": 2}, validation={"every_n_steps": 2})
    command = ["fit", "--config", str(recipe)]
    assert _await_exit(_fork([*command, "--run_dir", str(tmp_path / "whole")], output)) == 0, output.read_text()
    assert _await_exit(_fork(command, output, _slow_to_log)) == -signal.SIGKILL, output.read_text()
    assert _await_exit(_fork(command, output)) == 0, output.read_text()
    assert [step for word, step, _ in _log(tmp_path / "run") if word == "train"] == [0, 1, 2, 3, 4, 5]
    _assert_same_run(tmp_path / "run", tmp_path / "whole", read_scalars, 6)


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
    assert _await_exit(_fork([*command, *alone], output)) == 0, output.read_text()
    assert _await_exit(_fork([*command, *elastic, "--trainer.max_steps", "8"], output)) == 0, output.read_text()
    two = ["-m", "gpt2_lightning", *command, *elastic, "--trainer.max_steps", "16", *TWO]
    with _commands(output, two) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()
    assert _await_exit(_fork([*command, *elastic], output)) == 0, output.read_text()
    steps = [step for word, step, _ in _log(tmp_path / "elastic") if word == "train"]
    assert steps == list(range(24))  # each once: it went on where it had stopped
    _assert_close_curves(tmp_path / "elastic", tmp_path / "alone", read_scalars, 24)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_nodes_under_torchrun_train_as_one_process_does(make_shards, write_recipe, read_scalars, tmp_path):
    output = tmp_path / "output.txt"
    recipe = write_recipe(
        make_shards(), trainer={"max_steps": 4}, validation={"every_n_steps": 2}, data={"micro_batch_size": 8}
    )
    command = ["fit", "--config", str(recipe)]
    assert _await_exit(_fork([*command, "--run_dir", str(tmp_path / "alone")], output)) == 0, output.read_text()
    for devices, micro_batch_size in (1, 4), (1, 2), (2, 1):  # of the step's 8 sequences: at once, or accumulated
        run = tmp_path / f"{devices}x{micro_batch_size}"
        split = ["--trainer.num_nodes", "2", "--trainer.devices", str(devices), "--trainer.strategy", "ddp"]
        split += ["--data.micro_batch_size", str(micro_batch_size), "--run_dir", str(run)]
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(devices)]
        torchrun += ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
        program = ["-m", "gpt2_lightning", *command, *split]
        nodes = [[*torchrun, "--node_rank", str(rank), *program] for rank in (0, 1)]
        with _commands(output, *nodes) as processes:
            for process in processes:
                assert process.wait(PATIENCE) == 0, output.read_text()[-5000:]
        _assert_close_curves(run, tmp_path / "alone", read_scalars, 4)


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
    with _commands(output, [*program, "--run_dir", str(tmp_path / "whole")]) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()[-3000:]

    run = tmp_path / "cut"
    program += ["--run_dir", str(run)]
    for doomed, more in ([0], 0), ([0], 50), ([1], 50), ([0, 1], 50):  # the first before the two have met
        before = len(_log(run))
        with _commands(output, program) as (first,):
            _until(lambda: _descendants(first.pid), lambda: first.poll() is None, output)
            if more:
                _until(lambda: len(_log(run)) > before + more, lambda: first.poll() is None, output)  # noqa: B023
            ranks = [first.pid, *_descendants(first.pid)]
            assert len(ranks) == 2
            for rank in doomed:
                os.kill(ranks[rank], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while left := [pid for pid in ranks if first.poll() is None or pid in _processes()]:
                assert time.monotonic() < deadline, f"rank {doomed} was killed and {left} hang: {output.read_text()}"
                time.sleep(0.2)
            assert first.returncode != 0
    with _commands(output, program) as (process,):
        assert process.wait(PATIENCE) == 0, output.read_text()[-3000:]
    _assert_same_run(run, tmp_path / "whole", read_scalars, steps)
