"""One run: what stops it, where it goes on, and who may write into its folder. In this process; see test_job.py."""

import contextlib
import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import assert_same_run, read_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, saved_steps
from gpt2_lightning.callbacks.log_txt import LogTxt
from gpt2_lightning.callbacks.signals import StopOnSignal
from gpt2_lightning.callbacks.steps import EveryNSteps
from gpt2_lightning.cli.launchers import claim, is_first_process
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.module import GPTModule

SCHEDULE = {
    "class_path": "gpt2_lightning.schedule.WarmupCosine",
    "init_args": {"warmup_steps": 2, "max_steps": 8, "min_lr": 3e-4},
}


def _flip(path: Path, at: float = 0.5) -> None:
    """One bit of a file, the way a bad disk does it; in place, so that its other names see it too."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


class Killed(BaseException):
    """Stands for kill -9, which test_unkillable.py sends to whole processes: nothing of ours may catch it."""


@contextlib.contextmanager
def _at_event(number: int, strike: Callable[[], None]) -> Iterator[None]:
    """Calls ``strike`` at the ``number``-th of a run's micro-batches, validation batches and renames of checkpoints."""
    left = [number]

    def striking(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                strike()
            return plain(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((GPTModule, "training_step"), (GPTModule, "validation_step"), (os, "replace")):
            patch.setattr(owner, name, striking(getattr(owner, name)))
        yield


def _die() -> None:
    raise Killed


EXAMPLE = itertools.count()
WHOLE_RUNS = {"phases": [Phase.generate], "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@settings(max_examples=10, **WHOLE_RUNS)
@given(data=st.data())
def test_cut_anywhere_in_any_way_again_and_again_it_is_the_run_never_cut(
    data, make_shards, write_recipe, read_scalars, tmp_path
):
    draw, name = data.draw, f"example{next(EXAMPLE)}"
    steps, N, M = draw(st.integers(3, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    recipe = write_recipe(
        make_shards(name=f"{name}-data"),
        name=name,
        trainer={"max_steps": steps},
        model={
            "config": {"block_size": 16, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16},
            "lr_scheduler": {**SCHEDULE, "init_args": SCHEDULE["init_args"] | {"max_steps": steps}},
            "optimizer": {"class_path": f"gpt2_lightning.optim.{draw(st.sampled_from(['AdamW', 'Muon']))}"},
        },
        data={
            "order": draw(st.sampled_from(["sequential", "shuffled"])),
            "micro_batch_size": draw(st.sampled_from([4, 8])),
            "batch_size_schedule": draw(st.sampled_from([None, {"start_tokens": 32, "ramp_tokens": 150}])),
        },
        validation={"every_n_steps": N},
        checkpoint={"every_n_steps": M},
    )
    whole, cut = tmp_path / f"{name}-whole", tmp_path / name
    args = ["fit", "--config", str(recipe), "--run_dir"]
    assert main([*args, str(whole)]) == 0
    assert [step for word, step, _ in read_log(whole) if word == "val"] == sorted({*range(0, steps, N), steps})
    assert [saved.name for saved in saved_steps(whole / "checkpoints")] == [
        f"step_{step:06d}.ckpt" for step in sorted({*range(M, steps, M), steps})
    ]

    for _ in range(draw(st.integers(1, 3))):
        workers = ["--data.num_workers", draw(st.sampled_from(["0", "0", "2"]))]  # another number at each start
        strike = draw(st.sampled_from([_die, lambda: os.kill(os.getpid(), signal.SIGTERM), None]))
        if strike is None:  # a shorter run first, which is validated where it ends
            end = min(steps, N * draw(st.integers(1, steps)))
            assert main([*args, str(cut), *workers, "--trainer.max_steps", str(end)]) == 0
            continue
        with _at_event(draw(st.integers(1, 30)), strike), contextlib.suppress(Killed):
            assert main([*args, str(cut), *workers]) in (0, 128 + signal.SIGTERM)
    assert main([*args, str(cut)]) == 0
    assert_same_run(cut, whole, read_scalars, steps)


class Noted(EveryNSteps):
    """Notes the steps that it runs after."""

    def __init__(self, every_n_steps: int, evaluates: bool) -> None:
        super().__init__(every_n_steps)
        self.evaluates = evaluates
        self.noted: list[int] = []

    def run(self, trainer: Any, module: Any, step: int) -> None:
        self.noted.append(step)


@given(data=st.data())
def test_every_n_steps_is_0_and_n_and_2n_and_the_last_however_often_a_run_is_cut(data):
    """Cut by a kill, which goes back to the last checkpoint, or by a signal, which ends the run after the step."""
    draw = data.draw
    N, M, micro_batch_sizes, steps = (
        draw(st.integers(least, most)) for least, most in ((0, 9), (1, 9), (1, 3), (1, 20))
    )
    module, stop = GPTModule(GPTConfig(1, 1, 1, 1, 1)), StopOnSignal()
    made: list[int] = []  # as a reader of the logs sees it: what comes again stands there once
    saved, state, put_off = 0, None, None
    while True:
        evaluation, checkpoint = Noted(N, evaluates=True), Noted(M, evaluates=False)
        if state is not None:
            evaluation.load_state_dict(state)
        made = [step for step in made if step <= saved and state is not None]  # without a checkpoint all begins anew
        callbacks, stop.signal = [stop, evaluation, checkpoint], 0
        trainer: Any = SimpleNamespace(global_step=saved, max_steps=steps, should_stop=False, callbacks=callbacks)
        for callback in callbacks[1:]:
            callback.on_train_start(trainer, module)
        killed = draw(st.none() | st.integers(0, 3 * micro_batch_sizes * steps))  # after so many micro-batches
        signalled = draw(st.none() | st.integers(saved + 1, steps + 1))  # in this step
        count = 0
        while trainer.global_step < steps and not trainer.should_stop and count != killed:
            count += 1
            if count % micro_batch_sizes == 0:
                trainer.global_step += 1
                if trainer.global_step == signalled:
                    stop.signal, trainer.should_stop = signal.SIGTERM, True
            for callback in callbacks[1:]:
                callback.on_train_batch_end(trainer, module, None, None, count)
            if checkpoint.noted[-1:] == [trainer.global_step]:
                saved, state = trainer.global_step, evaluation.state_dict()
                put_off = saved if trainer.should_stop else None
        ended = trainer.global_step == steps and count != killed
        if ended or trainer.should_stop:
            for callback in callbacks[1:]:
                callback.on_train_end(trainer, module)
            saved, state, put_off = trainer.global_step, evaluation.state_dict(), trainer.global_step
        assert evaluation.noted == sorted(set(evaluation.noted))
        # what a signal had put off at the checkpoint's step was perhaps made up for, and then the run was killed
        assert set(evaluation.noted) & set(made) <= {put_off}, "twice at one step"
        made += [step for step in evaluation.noted if step not in made]
        if ended:
            break
    assert made == (sorted({*range(0, steps, N), steps}) if N else [])


@settings(max_examples=30)
@given(at=st.integers(0, 4000), error=st.sampled_from([OSError(28, "No space left on device"), Killed()]))
def test_a_checkpoint_whose_writing_fails_at_any_byte_leaves_the_one_before_it(tmp_path_factory, at, error):
    path = tmp_path_factory.mktemp("checkpoints") / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100)}, path)
    before = path.read_bytes()

    class Full:
        """A file on a disk that has room for ``at`` bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, at

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *what: Any) -> None:
            self.file.close()

        def write(self, part: bytes) -> int:
            self.file.write(bytes(part)[: self.room])
            self.room -= len(part)
            if self.room < 0:
                raise error
            return len(part)

    plain = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r": (Full if set(mode) & set("wx") else iter)(plain(path, mode)))
        try:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(100)}, path)
            assert path.stat().st_size <= at
            assert torch.equal(torch.load(path)["weights"], torch.ones(100))
        except (Killed, ValueError):
            assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(
    damage, make_shards, write_recipe, read_scalars, tmp_path, capsys
):
    root = make_shards()
    args = [
        "fit",
        "--config",
        str(write_recipe(root, model={"lr_scheduler": SCHEDULE}, checkpoint={"every_n_steps": 2})),
    ]
    assert main([*args, "--trainer.max_steps", "8", "--run_dir", "whole"]) == 0
    assert main([*args, "--trainer.max_steps", "6"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if "4" in path.name}
    last = folder / "last.ckpt"
    if damage == "flip":
        _flip(last)
    else:
        with last.open("r+b") as file:
            file.truncate(1000 if damage == "cut" else 0)
    capsys.readouterr()
    assert main([*args, "--trainer.max_steps", "8"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    offer = f"--ckpt_path {folder / 'step_000004.ckpt'}"
    assert said[0].startswith(f"gpt2 fit: error: {last} is damaged (")
    assert offer in said[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if "4" in path.name} == before
    assert main([*args, "--trainer.max_steps", "8", *offer.split()]) == 0
    assert read_scalars(tmp_path / "run")["train/loss"] == read_scalars(Path("whole"))["train/loss"]


def test_several_starts_make_one_line(make_shards, write_recipe, read_scalars, tmp_path, capsys):
    """A start that goes on from step 4 makes steps 4 and 5 again: they stand there once."""
    recipe = write_recipe(make_shards(), model={"lr_scheduler": SCHEDULE}, checkpoint={"every_n_steps": 4})
    args = ["fit", "--config", str(recipe), "--validation.every_n_steps", "2"]
    assert main([*args, "--trainer.max_steps", "8", "--run_dir", "whole"]) == 0
    assert main([*args, "--trainer.max_steps", "6"]) == 0
    capsys.readouterr()
    earlier = str(tmp_path / "run" / "checkpoints" / "step_000004.ckpt")
    assert main([*args, "--trainer.max_steps", "8", "--ckpt_path", earlier]) == 0
    assert f"resuming from {earlier} at step 4" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    for tag, expected in (("val/loss", [0, 2, 4, 6, 8]), ("train/tokens", [0, 1, 2, 3, 4, 5, 6, 7])):
        steps = [event.step for event in events.Scalars(tag)]
        assert sorted(set(steps)) == expected
        assert len(steps) <= len(expected) + 1  # TensorBoard drops what follows the resumed step
    assert (tmp_path / "run" / "log.txt").read_text() == Path("whole/log.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "run").glob("config*.yaml")) == ["config.yaml", "config_1.yaml"]


def test_log_txt_drops_what_comes_again(tmp_path):
    (tmp_path / "log.txt").write_text(
        "0 val 9.0000\n0 train 9.0\n1 val 8.0000\n1 train 8.0\n2 val 7.0000\n2 train 7.0\n"
    )
    log = LogTxt(tmp_path, resumed_step=1)
    log.log_metrics({"train/loss": 7.5}, 1)
    log.log_metrics({"val/loss": 6.5}, 2)
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "0 val 9.0000", "0 train 9.0", "1 val 8.0000", "1 train 7.500000", "2 val 6.5000"
    ]  # fmt: skip


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(make_shards, write_recipe, read_scalars, tmp_path):
    # memorises 17 windows and so forgets the rest: the loss falls, then rises
    recipe = write_recipe(
        make_shards(train=300),
        trainer={"max_steps": 60},
        validation={"every_n_steps": 10},
        checkpoint={"every_n_steps": 20},
    )
    args = ["fit", "--config", str(recipe), "--model.optimizer.lr", "0.05"]
    assert main([*args, "--trainer.max_steps", "40"]) == 0
    assert main(args) == 0
    losses = read_scalars(tmp_path / "run")["val/loss"]
    lowest = min((20, 40, 60), key=lambda step: losses[step])
    assert lowest != 60, "it was to overfit"
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best.ckpt").samefile(folder / f"step_{lowest:06d}.ckpt")
    assert (folder / "last.ckpt").samefile(folder / "step_000060.ckpt")
    last = torch.load(folder / "last.ckpt", weights_only=True)
    best = next(state["best_val_loss"] for state in last["callbacks"].values() if "best_val_loss" in state)
    assert best == pytest.approx(losses[lowest])


def test_a_validation_that_is_not_a_number_does_not_hide_a_better_one_after_it(
    make_shards, write_recipe, tmp_path, monkeypatch
):
    losses = {0: math.inf, 2: 3.0, 4: math.nan, 6: 2.0}
    monkeypatch.setattr(StepCheckpoint, "_val_loss", staticmethod(lambda trainer, step: losses[step]))
    assert main(["fit", "--config", str(write_recipe(make_shards(), checkpoint={"every_n_steps": 2}))]) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best.ckpt").samefile(folder / "step_000006.ckpt")


def test_only_the_newest_checkpoints_are_kept_where_that_is_asked(make_shards, write_recipe, tmp_path, capsys):
    args = ["fit", "--config", str(write_recipe(make_shards(), checkpoint={"every_n_steps": 2, "keep": 2}))]
    folder = tmp_path / "run" / "checkpoints"

    def steps() -> list[str]:
        return sorted(path.name for path in folder.glob("step_*"))

    assert main([*args, "--trainer.max_steps", "8"]) == 0
    assert steps() == ["step_000006.ckpt", "step_000008.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "step_000008.ckpt")
    assert (folder / "best.ckpt").exists()
    # back to an earlier one: what lies after it is not taken for newer
    earlier = ["--ckpt_path", str(folder / "step_000006.ckpt"), "--trainer.max_steps", "7"]
    assert main([*args, *earlier]) == 0
    assert steps() == ["step_000006.ckpt", "step_000007.ckpt", "step_000008.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "step_000007.ckpt")
    capsys.readouterr()
    assert main([*args, "--checkpoint.keep", "1"]) == 1
    assert "checkpoint.keep is 1: give 0 for all, or at least 2" in capsys.readouterr().err


def test_another_runs_checkpoint_begins_a_run_once(make_shards, write_recipe, tmp_path, capsys):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    first = tmp_path / "run" / "checkpoints" / "step_000003.ckpt"
    for resume in ("never", "auto"):  # never: the new folder is to have none of its own
        begun = [*args, "--ckpt_path", str(first), "--run_dir", resume, "--trainer.max_steps", "6"]
        capsys.readouterr()
        assert main([*begun, "--resume", resume]) == 0
        assert f"resuming from {first} at step 3\n" in capsys.readouterr().out
        assert main(begun) == 0
        own = Path(resume) / "checkpoints" / "last.ckpt"
        said = f"resuming from {own} at step 6; --ckpt_path {first} is what the run began with"
        assert said in capsys.readouterr().out
    assert main([*begun, "--resume", "never"]) == 1
    assert main([*args, "--ckpt_path", str(first), "--run_dir", "must", "--resume", "must"]) == 1


def test_a_step_back_is_made_once_by_the_same_command(make_shards, write_recipe, tmp_path, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    folder = tmp_path / "run" / "checkpoints"
    back = ["fit", "--config", str(recipe), "--ckpt_path", str(folder / "step_000003.ckpt")]
    for steps, resumed in (
        ("4", "step_000003.ckpt at step 3"),
        ("5", "last.ckpt at step 4"),
        ("6", "last.ckpt at step 5"),
    ):
        capsys.readouterr()
        assert main([*back, "--trainer.max_steps", steps]) == 0
        assert f"resuming from {folder}/{resumed}" in capsys.readouterr().out
    other = ["--ckpt_path", str(folder / "step_000004.ckpt")]  # another step back is another command
    assert main(["fit", "--config", str(recipe), *other]) == 0
    assert f"resuming from {folder}/step_000004.ckpt at step 4" in capsys.readouterr().out
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "run").glob("config*.yaml")]
    assert {config["ckpt_path"] for config in configs} == {None}  # so that they are recipes for other runs


def test_a_warm_up_longer_than_the_run_is_told(make_shards, write_recipe, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "2"]) == 0
    assert "the warm-up of 2 steps is not over when this run of 2 ends" in capsys.readouterr().out


def test_a_finished_run_says_so(make_shards, write_recipe, capsys):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main(args) == 0
    assert "is finished" not in capsys.readouterr().out
    assert main(args) == 0
    assert "this run is finished, raise trainer.max_steps=6 to go on" in capsys.readouterr().out


def test_a_run_stopped_by_time_goes_on_as_if_it_had_not_been(make_shards, write_recipe, read_scalars, tmp_path):
    root = make_shards()
    schedule = {**SCHEDULE, "init_args": SCHEDULE["init_args"] | {"max_steps": 10_000}}
    recipe = write_recipe(root, model={"lr_scheduler": schedule}, validation={"every_n_steps": 0})
    args = ["fit", "--config", str(recipe), "--checkpoint.every_n_steps", "100000"]
    assert main([*args, "--trainer.max_steps", "10000", "--trainer.max_time", "00:00:00:01"]) == 0
    stopped = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped < 10_000
    end = str(stopped + 3)
    assert main([*args, "--trainer.max_steps", end]) == 0
    assert main([*args, "--trainer.max_steps", end, "--run_dir", "whole"]) == 0
    cut, whole = read_scalars(tmp_path / "run"), read_scalars(Path("whole"))
    assert list(cut["train/loss"]) == list(range(stopped + 3))
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert cut[tag] == whole[tag]


def test_what_a_resumed_run_cannot_obey_is_refused(make_shards, write_recipe, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    for change, part in (
        (["--seed_everything", "7"], "began with seed_everything=1337, not 7"),
        (
            ["--data.batch_size_schedule.start_tokens", "64", "--data.batch_size_schedule.ramp_tokens", "100"],
            "batch_size_schedule=None, not {'start_tokens': 64, 'ramp_tokens': 100",
        ),
    ):
        capsys.readouterr()
        assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "9", *change]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert part in said
        assert "another run_dir" in said


def test_without_last_ckpt_the_newest_step_is_taken(make_shards, write_recipe, tmp_path, capsys):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    capsys.readouterr()
    assert main([*args, "--resume", "must"]) == 0
    assert re.search(r"resuming from .*step_000003.ckpt at step 3", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("environment", "flags", "part"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, [], "torchrun started 2 processes, 2 on each of 1 nodes"),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
            "give --trainer.devices 2 --trainer.num_nodes 2 --trainer.strategy ddp",
        ),
        (
            {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
            "give --trainer.devices 1 --trainer.num_nodes 1,",
        ),
        ({"SLURM_NTASKS": "8"}, [], "Use `--ntasks-per-node=8` instead"),
        (
            {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"},
            [],
            "SLURM started 8 processes, 4 on each of 2 nodes",
        ),
    ],
)
def test_a_launcher_that_contradicts_the_trainer(
    environment, flags, part, make_shards, write_recipe, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", "--config", str(write_recipe(make_shards())), *flags]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert part in said[-1]
    assert "Traceback" not in "".join(said)


def test_one_process_of_a_job_is_the_first(monkeypatch):
    assert is_first_process()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")
    assert is_first_process()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        with monkeypatch.context() as context:
            context.setenv(name, "1")
            assert not is_first_process(), name


def test_a_run_folder_that_cannot_be_written_is_refused_at_start(make_shards, write_recipe, tmp_path, capsys):
    recipe = write_recipe(make_shards())
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("a file where the folder should be")
    assert main(["fit", "--config", str(recipe)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"{run / 'checkpoints'} cannot be written to" in said[0]
    assert "choose another run_dir" in said[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_checkpoint_folder_is_refused_at_start(make_shards, write_recipe, tmp_path, capsys):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    folder.chmod(0o555)
    try:
        assert main(args) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(folder) in said
        assert "give this user the right" in said
    finally:
        folder.chmod(0o755)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    assert main(args) == 0


def test_what_a_killed_job_half_wrote_is_cleared_away(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in (".step_000004.ckpt.tmp", "step_000002.ckpt", "mine.txt"):
        (folder / name).write_text("x")
    claim(tmp_path / "run").close()
    assert sorted(path.name for path in folder.iterdir()) == ["mine.txt", "step_000002.ckpt"]


def test_precision_intervals_and_micro_batch_are_obeyed_on_resume(make_shards, write_recipe, read_scalars, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    changes = ["--trainer.precision", "bf16-mixed", "--validation.every_n_steps", "2", "--data.micro_batch_size", "2"]
    assert main([*args, "--trainer.max_steps", "7", *changes]) == 0
    logged = read_scalars(tmp_path / "run")
    assert list(logged["val/loss"]) == [0, 3, 4, 6, 7]
    assert list(logged["train/loss"]) == list(range(7))
    assert all(math.isfinite(loss) for loss in logged["train/loss"].values())


@pytest.fixture
def signal_in_step(monkeypatch):
    """Sends this process a SIGTERM in the middle of a step, once."""
    plain, due = GPTModule.training_step, []

    def training_step(self, batch, batch_idx):
        if due and batch_idx == due[0] * self.trainer.accumulate_grad_batches:
            due.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", training_step)
    return due.append


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
@pytest.mark.parametrize("step", [0, 2, 3, 4, 5, 7])
def test_a_signal_at_any_step_leaves_the_curve_as_it_is(
    step, signal_in_step, make_shards, write_recipe, read_scalars, tmp_path
):
    # validation after 0, 2, 4, 6, 8 updates and checkpoints after 4 and 8: the signal comes before, at and after them
    recipe = write_recipe(make_shards(), trainer={"max_steps": 8}, validation={"every_n_steps": 2})
    args = ["fit", "--config", str(recipe), "--checkpoint.every_n_steps", "4"]
    assert main([*args, "--run_dir", "whole"]) == 0
    signal_in_step(step)
    assert main(args) == 128 + signal.SIGTERM
    assert main(args) == 0
    cut, whole = read_scalars(tmp_path / "run"), read_scalars(Path("whole"))
    for tag in ("train/loss", "train/grad_norm", "train/lr", "train/tokens", "val/loss"):
        assert cut[tag] == whole[tag], tag
    assert (tmp_path / "run" / "log.txt").read_text() == Path("whole/log.txt").read_text()
    last = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (tmp_path / "run", Path("whole"))
    ]
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name]), name


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_best_counts_a_validation_that_a_signal_had_put_off(signal_in_step, make_shards, write_recipe, tmp_path):
    recipe = write_recipe(make_shards(), trainer={"max_steps": 4}, validation={"every_n_steps": 1})
    args = ["fit", "--config", str(recipe), "--model.optimizer.lr", "10.0"]  # it only gets worse
    signal_in_step(0)
    assert main(args) == 128 + signal.SIGTERM
    assert main(args) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best.ckpt").samefile(folder / "step_000001.ckpt")


def test_the_same_command_with_a_time_limit_gets_on(make_shards, write_recipe, tmp_path):
    recipe = write_recipe(make_shards(), checkpoint={"every_n_steps": 10**6}, validation={"every_n_steps": 0})
    args = ["fit", "--config", str(recipe), "--trainer.max_steps", "1000000", "--trainer.max_time", "00:00:00:01"]
    steps = []
    for _ in range(2):
        assert main(args) == 0
        steps.append(torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
    assert 0 < steps[0] < steps[1]


def test_a_learning_rate_typed_on_resume_is_obeyed_by_torchs_schedulers_too(
    make_shards, write_recipe, read_scalars, tmp_path
):
    step_lr = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.1}}
    recipe = write_recipe(make_shards(), model={"lr_scheduler": step_lr})
    args = ["fit", "--config", str(recipe), "--model.optimizer.lr"]
    assert main([*args, "0.01", "--trainer.max_steps", "3"]) == 0
    assert main([*args, "0.5", "--trainer.max_steps", "6"]) == 0
    rates = list(read_scalars(tmp_path / "run")["train/lr"].values())
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.05, 0.005, 0.005])


def test_odd_files_in_the_run_folder_do_not_stop_a_run(make_shards, write_recipe, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    run = tmp_path / "run"
    (run / "config.yaml").write_text("{")
    with (run / "log.txt").open("a") as file:
        file.write("\nmy own words\n9 tr")
    assert main(args) == 0
    lines = (run / "log.txt").read_text().splitlines()
    assert "my own words" in lines
    assert [line.split()[0] for line in lines if " train " in line] == ["0", "1", "2", "3", "4", "5"]
    assert "ckpt_path: null" in (run / "config_1.yaml").read_text()  # a recipe for other runs too
    assert (run / "config.yaml").read_text() == "{"


def test_the_seed_of_a_run_is_that_of_its_weights(make_shards, write_recipe, tmp_path):
    """A first start that left no checkpoint counts for nothing, nor does a start that was refused."""
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--seed_everything", "1", "--checkpoint.every_n_steps", "0", "--trainer.max_steps", "1"]) == 0
    assert main([*args, "--seed_everything", "2", "--trainer.max_steps", "3"]) == 0
    assert main([*args, "--seed_everything", "1"]) == 1
    assert main([*args, "--seed_everything", "2", "--data.seed", "9"]) == 1
    assert len(list((tmp_path / "run").glob("config*.yaml"))) == 2
    assert main([*args, "--seed_everything", "2"]) == 0
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert len(lines) == len({tuple(line.split()[:2]) for line in lines}) == 9


def test_checkpoints_are_ordered_by_step(tmp_path):
    names = ["step_000002.ckpt", "step_999999.ckpt", "step_1000000.ckpt"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in saved_steps(tmp_path)] == names


def test_a_checkpoint_of_another_lightning_model_is_named(make_shards, write_recipe, tmp_path, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    ours = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "lr_schedulers", "global_step", "callbacks", "hyper_parameters"):
        torch.save({k: v for k, v in ours.items() if k != part}, "foreign.ckpt")
        capsys.readouterr()
        assert main(["fit", "--config", str(recipe), "--run_dir", "new", "--ckpt_path", "foreign.ckpt"]) == 1
        assert "foreign.ckpt is no checkpoint of a gpt2_lightning run" in capsys.readouterr().err


def test_no_validation_is_no_best(make_shards, write_recipe, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards())), "--trainer.limit_val_batches", "0"]
    assert main(args) == 0
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_overfitting_several_micro_batches_is_a_whole_step(make_shards, write_recipe, read_scalars, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards())), "--trainer.overfit_batches", "2"]
    assert main(args) == 0
    assert list(read_scalars(tmp_path / "run")["train/loss"]) == list(range(6))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--trainer.min_steps", "3"], "trainer.min_steps"),
        (["--resume", "never", "--ckpt_path", "run/checkpoints/last.ckpt"], "resume is never"),
    ],
)
def test_what_contradicts_itself_is_refused(flags, part, make_shards, write_recipe, capsys):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "1"]) == 0
    assert main([*args, *flags]) == 1
    assert part in capsys.readouterr().err


def test_slurm_without_scontrol_says_so(monkeypatch, capsys):
    from gpt2_lightning.cli.launchers import requeue

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", "")
    requeue()
    assert "SLURM job 7 could not be requeued" in capsys.readouterr().out
