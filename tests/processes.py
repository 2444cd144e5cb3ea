"""Whole processes for tests: start, watch and kill them, and compare the runs that they leave."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_lightning.__main__ import main

EXACT = {"train/loss", "train/grad_norm", "train/lr", "train/tokens", "val/loss"}  # all that is logged except speed
TIMEOUT = 120.0  # seconds after which something that must happen counts as not happening, on a busy machine
TWO_DEVICES = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
Scalars = dict[str, dict[int, float]]


# -- processes ---------------------------------------------------------------------------------------------------------


def run_gpt2(args: list[str], output: Path) -> None:
    """In a new process: ``gpt2 ARGS``, its output appended to a file."""
    os.setpgrp()  # so that workers that outlive it can be found
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # the server that forks was started before the test set its environment
    multiprocessing.set_start_method(None, force=True)  # DataLoader workers start as in a process of the shell
    raise SystemExit(main(args))


def fork(args: list[str], output: Path, program: Callable[[list[str], Path], None] = run_gpt2) -> ForkServerProcess:
    """``gpt2 ARGS`` in a process of its own, forked from a server that has done the imports, which take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "gpt2_lightning.cli.fit", "torch.utils.tensorboard"])
    process = context.Process(target=program, args=(args, output))
    process.start()
    return process


def await_exit(process: ForkServerProcess) -> int | None:
    process.join(TIMEOUT)
    return process.exitcode


@contextlib.contextmanager
def commands(
    output: Path, *commands: list[str], environments: Sequence[dict[str, str]] = ()
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """``python COMMAND`` for each command, started together; at the end whatever is left of them is killed."""
    with output.open("ab") as file:
        started = [
            subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
            for command, environment in zip(commands, environments or [{}] * len(commands), strict=True)
        ]
    try:
        yield started
    finally:
        for process in started:
            for pid in [*descendants(process.pid), process.pid]:
                kill_process(pid)
            process.wait()


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def live_processes() -> dict[int, tuple[int, int]]:
    """Process id → (parent's id, group's id) of each process that is alive."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX":
                found[int(path.parent.name)] = int(parent), int(group)
    return found


def descendants(pid: int) -> list[int]:
    alive = live_processes()
    found = [pid]
    for parent in found:
        found += [child for child, (its_parent, _) in alive.items() if its_parent == parent]
    return found[1:]


def kill_group(leader: int) -> None:
    """Kills the workers of a process that was killed, which may outlive it by seconds."""
    for pid, (_, group) in live_processes().items():
        if group == leader:
            kill_process(pid)


def wait_until(condition: Callable[[], Any], is_alive: Callable[[], bool], output: Path) -> None:
    """Returns as soon as ``condition`` holds; the process that is watched must not end before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert is_alive(), f"it ended early:\n{output.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"timed out:\n{output.read_text()[-3000:]}"
        time.sleep(0.0005)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# -- runs --------------------------------------------------------------------------------------------------------------


def read_log(run: Path) -> list[tuple[str, int, str]]:
    """The lines of log.txt so far: (train or val, step, value)."""
    path = run / "log.txt"
    text = path.read_text() if path.exists() else ""
    return [(word, int(step), value) for step, word, value in map(str.split, text.splitlines())]


def saved_step(run: Path) -> int:
    """The step of last.ckpt."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def assert_same_run(run: Path, expected: Path, read_scalars: Callable[[Path], Scalars], steps: int) -> None:
    """To the last bit: the curves in TensorBoard's events and in log.txt, the weights, the optimizer's state."""
    ours, theirs = read_scalars(run), read_scalars(expected)
    assert list(theirs["train/loss"]) == list(range(steps))
    assert len(set(theirs["train/loss"].values())) > steps // 2  # steps can be told apart
    for tag in EXACT & theirs.keys():
        assert ours[tag] == theirs[tag], tag
    curves = [{(word, step): value for word, step, value in read_log(path)} for path in (run, expected)]
    assert curves[0] == curves[1]
    checkpoints = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, expected)]
    assert checkpoints[0]["global_step"] == steps
    names = [[g.pop("param_names") for g in c["optimizer_states"][0]["param_groups"]] for c in checkpoints]
    assert names[0] == names[1]  # assert_close compares numbers only
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(checkpoints[0][part], checkpoints[1][part], rtol=0, atol=0)
    assert not list((run / "checkpoints").glob(".*"))  # no half-written file is left


def assert_close_curves(
    run: Path, expected: Path, read_scalars: Callable[[Path], Scalars], steps: int, not_validated: Sequence[int] = ()
) -> None:
    """The same steps and validation points, except those not validated, with the same values to rounding."""
    ours, theirs = read_scalars(run), read_scalars(expected)
    assert list(theirs["train/loss"]) == list(range(steps))
    neighbours = np.diff(list(theirs["train/loss"].values()))
    assert np.abs(neighbours).min() > 2e-4  # a step on other sequences would show
    for step in not_validated:
        del theirs["val/loss"][step]
    for tag in EXACT:
        assert list(ours[tag]) == list(theirs[tag]), tag
        np.testing.assert_allclose(list(ours[tag].values()), list(theirs[tag].values()), rtol=1e-5, err_msg=tag)
