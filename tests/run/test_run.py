"""One run in one process: how it stops, resumes, and chooses its checkpoints. Whole processes are in tests/process."""

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
from processes import EXACT, assert_same_run, read_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.log_txt import LogTxt
from gpt2_lightning.callbacks.signals import StopOnSignal
from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.checkpoints.ours import saved_steps
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import GPTModule

posix = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
SCHEDULE = {
    "class_path": "gpt2_lightning.schedule.WarmupCosine",
    "init_args": {"warmup_steps": 2, "max_steps": 8, "min_lr": 3e-4},
}


def _steps_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


# -- resuming ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9, which test_unkillable.py sends to whole processes: no code of ours may catch it."""


@contextlib.contextmanager
def _at_event(number: int, strike: Callable[[], None]) -> Iterator[None]:
    """Calls ``strike`` at the ``number``-th forward pass (of training or validation) or rename of a file."""
    events = itertools.count(1)

    def striking(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(events) == number:
                strike()
            return plain(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((GPT, "hidden"), (os, "replace")):
            patch.setattr(owner, name, striking(getattr(owner, name)))
        yield


def _die() -> None:
    raise Killed


EXAMPLE = itertools.count()


@pytest.mark.slow
@posix
@settings(max_examples=6, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_cut_anywhere_again_and_again_equals_an_uninterrupted_run(
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
        workers = ["--data.num_workers", draw(st.sampled_from(["0", "0", "2"]))]
        strike = draw(st.sampled_from([_die, lambda: os.kill(os.getpid(), signal.SIGTERM), None]))
        if strike is None:  # a shorter run first, which is validated where it ends
            end = min(steps, N * draw(st.integers(1, steps)))
            assert main([*args, str(cut), *workers, "--trainer.max_steps", str(end)]) == 0
            continue
        with _at_event(draw(st.integers(1, 30)), strike), contextlib.suppress(Killed):
            assert main([*args, str(cut), *workers]) in (0, 128 + signal.SIGTERM)
    assert main([*args, str(cut)]) == 0
    assert_same_run(cut, whole, read_scalars, steps)


@posix
@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_run_stopped_by_a_signal_at_any_step_equals_an_uninterrupted_run(
    step, signal_in_step, make_shards, write_recipe, read_scalars, tmp_path
):
    # validation after 0, 2, 4, 6, 8 steps and checkpoints after 4 and 8: the signal comes before, at and after them
    recipe = write_recipe(make_shards(), trainer={"max_steps": 8}, validation={"every_n_steps": 2})
    args = ["fit", "--config", str(recipe), "--checkpoint.every_n_steps", "4"]
    assert main([*args, "--run_dir", "whole"]) == 0
    signal_in_step(step)
    assert main(args) == 128 + signal.SIGTERM
    assert main(args) == 0
    assert_same_run(tmp_path / "run", Path("whole"), read_scalars, 8)


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


def test_runs_stopped_by_time_progress_and_equal_an_uninterrupted_run(
    make_shards, write_recipe, read_scalars, tmp_path
):
    schedule = {**SCHEDULE, "init_args": SCHEDULE["init_args"] | {"max_steps": 10**6}}
    every, never = {"every_n_steps": 10**6}, {"every_n_steps": 0}  # checkpoints where a run ends, and no validation
    recipe = write_recipe(make_shards(), model={"lr_scheduler": schedule}, validation=never, checkpoint=every)
    args = ["fit", "--config", str(recipe), "--trainer.max_steps"]
    stopped = [0]
    for _ in range(2):
        assert main([*args, "1000000", "--trainer.max_time", "00:00:00:01"]) == 0
        stopped.append(_steps_of(tmp_path / "run" / "checkpoints" / "last.ckpt"))
        assert stopped[-2] < stopped[-1] < 10**6
    end = str(stopped[-1] + 3)
    assert main([*args, end]) == 0
    assert main([*args, end, "--run_dir", "whole"]) == 0
    cut, whole = read_scalars(tmp_path / "run"), read_scalars(Path("whole"))
    assert list(cut["train/loss"]) == list(range(int(end)))
    for tag in EXACT - {"val/loss"}:
        assert cut[tag] == whole[tag]


@pytest.mark.parametrize("damage", ["one bit", "truncated"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_resumes(
    damage, make_shards, write_recipe, read_scalars, tmp_path, capsys
):
    recipe = write_recipe(make_shards(), model={"lr_scheduler": SCHEDULE}, checkpoint={"every_n_steps": 2})
    args = ["fit", "--config", str(recipe), "--trainer.max_steps"]
    assert main([*args, "8", "--run_dir", "whole"]) == 0
    assert main([*args, "6"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    last = folder / "last.ckpt"
    with last.open("r+b") as file:  # in place, so that its other names see it too
        if damage == "one bit":
            file.seek(last.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        else:
            file.truncate(1000)
    capsys.readouterr()
    assert main([*args, "8"]) == 1
    err = capsys.readouterr().err
    offer = f"--ckpt_path {folder / 'step_000004.ckpt'}"
    assert str(last) in err
    assert offer in err
    assert main([*args, "8", *offer.split()]) == 0
    assert read_scalars(tmp_path / "run")["train/loss"] == read_scalars(Path("whole"))["train/loss"]


def test_steps_that_are_trained_twice_are_logged_once(make_shards, write_recipe, tmp_path):
    recipe = write_recipe(make_shards(), model={"lr_scheduler": SCHEDULE}, checkpoint={"every_n_steps": 4})
    args = ["fit", "--config", str(recipe), "--validation.every_n_steps", "2", "--trainer.max_steps"]
    assert main([*args, "8", "--run_dir", "whole"]) == 0
    assert main([*args, "6"]) == 0
    run = tmp_path / "run"
    assert main([*args, "8", "--ckpt_path", str(run / "checkpoints" / "step_000004.ckpt")]) == 0
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag, expected in (("val/loss", [0, 2, 4, 6, 8]), ("train/tokens", [0, 1, 2, 3, 4, 5, 6, 7])):
        steps = [event.step for event in events.Scalars(tag)]
        assert sorted(set(steps)) == expected
        assert len(steps) <= len(expected) + 1  # TensorBoard drops what follows the resumed step
    assert (run / "log.txt").read_text() == Path("whole/log.txt").read_text()
    assert sorted(path.name for path in run.glob("config*.yaml")) == ["config.yaml", "config_1.yaml"]


def test_log_txt_keeps_evaluations_of_the_resumed_step_and_drops_what_follows(tmp_path):
    (tmp_path / "log.txt").write_text(
        "0 val 9.0000\n0 train 9.0\n1 val 8.0000\n1 train 8.0\n2 val 7.0000\n2 train 7.0\n"
    )
    log = LogTxt(tmp_path, resumed_step=1)
    log.log_metrics({"train/loss": 7.5}, 1)
    log.log_metrics({"val/loss": 6.5}, 2)
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "0 val 9.0000", "0 train 9.0", "1 val 8.0000", "1 train 7.500000", "2 val 6.5000"
    ]  # fmt: skip


def test_a_typed_checkpoint_starts_a_run_once_and_the_same_command_then_resumes(
    make_shards, write_recipe, tmp_path, capsys
):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    folder = tmp_path / "run" / "checkpoints"

    def resumed(run_dir: Path, typed: str, max_steps: int) -> str:
        args = ["--run_dir", str(run_dir), "--ckpt_path", str(folder / typed), "--trainer.max_steps", str(max_steps)]
        assert main(["fit", "--config", str(recipe), *args]) == 0
        return re.search(r"resuming from (\S+)", capsys.readouterr().out)[1]

    back, other = tmp_path / "run", tmp_path / "other"  # a step back in its own run, and the start of another one
    for run in (back, other):
        assert resumed(run, "step_000003.ckpt", 4) == str(folder / "step_000003.ckpt")
        assert resumed(run, "step_000003.ckpt", 5) == str(run / "checkpoints" / "last.ckpt")
    assert resumed(back, "step_000004.ckpt", 5) == str(folder / "step_000004.ckpt")  # another step back
    configs = [yaml.safe_load(path.read_text()) for path in back.glob("config*.yaml")]
    assert {config["ckpt_path"] for config in configs} == {None}  # so that they are recipes for other runs


def test_precision_intervals_and_micro_batch_may_change_on_resume(make_shards, write_recipe, read_scalars, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    changes = ["--trainer.precision", "bf16-mixed", "--validation.every_n_steps", "2", "--data.micro_batch_size", "2"]
    assert main([*args, "--trainer.max_steps", "7", *changes]) == 0
    logged = read_scalars(tmp_path / "run")
    assert list(logged["val/loss"]) == [0, 3, 4, 6, 7]
    assert list(logged["train/loss"]) == list(range(7))
    assert all(math.isfinite(loss) for loss in logged["train/loss"].values())


def test_a_new_learning_rate_on_resume_reaches_schedulers_of_torch(make_shards, write_recipe, read_scalars, tmp_path):
    step_lr = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.1}}
    recipe = write_recipe(make_shards(), model={"lr_scheduler": step_lr})
    args = ["fit", "--config", str(recipe), "--model.optimizer.lr"]
    assert main([*args, "0.01", "--trainer.max_steps", "3"]) == 0
    assert main([*args, "0.5", "--trainer.max_steps", "6"]) == 0
    rates = list(read_scalars(tmp_path / "run")["train/lr"].values())
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.05, 0.005, 0.005])


def test_a_run_resumes_from_a_folder_with_missing_broken_and_half_written_files(make_shards, write_recipe, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards()))]
    assert main([*args, "--trainer.max_steps", "3"]) == 0
    run = tmp_path / "run"
    (run / "checkpoints" / "last.ckpt").unlink()  # step_000003.ckpt is the newest then
    (run / "checkpoints" / ".step_000009.ckpt.tmp").write_text("what a killed process had written")
    (run / "config.yaml").write_text("{")
    with (run / "log.txt").open("a") as file:
        file.write("\nmy own words\n9 tr")
    assert main([*args, "--resume", "must"]) == 0
    lines = (run / "log.txt").read_text().splitlines()
    assert "my own words" in lines
    assert [line.split()[0] for line in lines if " train " in line] == ["0", "1", "2", "3", "4", "5"]
    assert (run / "config.yaml").read_text() == "{"
    assert not list((run / "checkpoints").glob(".*"))


def test_the_seed_of_a_run_is_that_of_its_first_checkpoint(make_shards, write_recipe, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards())), "--seed_everything"]
    assert main([*args, "1", "--checkpoint.every_n_steps", "0", "--trainer.max_steps", "1"]) == 0
    assert main([*args, "2", "--trainer.max_steps", "3"]) == 0
    assert main([*args, "1"]) == 1
    assert main([*args, "2"]) == 0
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert len(lines) == len({tuple(line.split()[:2]) for line in lines}) == 9


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(train=300),  # it memorises these and forgets the rest: the loss falls, then rises
        trainer={"max_steps": 60},
        validation={"every_n_steps": 10},
        checkpoint={"every_n_steps": 20},
    )
    args = ["fit", "--config", str(recipe), "--model.optimizer.lr", "0.05"]
    assert main([*args, "--trainer.max_steps", "40"]) == 0
    assert main(args) == 0
    losses = read_scalars(tmp_path / "run")["val/loss"]
    lowest = min((20, 40, 60), key=lambda step: losses[step])
    assert lowest != 60, "it should have overfitted"
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best.ckpt").samefile(folder / f"step_{lowest:06d}.ckpt")
    assert (folder / "last.ckpt").samefile(folder / "step_000060.ckpt")


@posix
def test_best_counts_a_validation_that_a_signal_left_to_the_resumed_run(
    signal_in_step, make_shards, write_recipe, tmp_path
):
    recipe = write_recipe(make_shards(), trainer={"max_steps": 4}, validation={"every_n_steps": 1})
    args = ["fit", "--config", str(recipe), "--model.optimizer.lr", "10.0"]  # it only gets worse
    signal_in_step(0)
    assert main(args) == 128 + signal.SIGTERM
    assert main(args) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best.ckpt").samefile(folder / "step_000001.ckpt")


def test_without_validation_there_is_no_best(make_shards, write_recipe, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards())), "--validation.every_n_steps", "0"]
    assert main(args) == 0
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_keep_deletes_all_but_the_newest_checkpoints_of_this_line_of_steps(make_shards, write_recipe, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards(), checkpoint={"every_n_steps": 2, "keep": 2}))]
    folder = tmp_path / "run" / "checkpoints"

    def steps() -> list[str]:
        return sorted(path.name for path in folder.glob("step_*"))

    assert main([*args, "--trainer.max_steps", "8"]) == 0
    assert steps() == ["step_000006.ckpt", "step_000008.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "step_000008.ckpt")
    assert (folder / "best.ckpt").exists()
    # back to an earlier one: those after it do not count as newer
    assert main([*args, "--ckpt_path", str(folder / "step_000006.ckpt"), "--trainer.max_steps", "7"]) == 0
    assert steps() == ["step_000006.ckpt", "step_000007.ckpt", "step_000008.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "step_000007.ckpt")


def test_checkpoints_are_ordered_by_step(tmp_path):
    names = ["step_000002.ckpt", "step_999999.ckpt", "step_1000000.ckpt"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in saved_steps(tmp_path)] == names


def test_overfitting_several_micro_batches_trains_whole_steps(make_shards, write_recipe, read_scalars, tmp_path):
    args = ["fit", "--config", str(write_recipe(make_shards())), "--trainer.overfit_batches", "2"]
    assert main(args) == 0
    assert list(read_scalars(tmp_path / "run")["train/loss"]) == list(range(6))


# -- the cadence of callbacks ------------------------------------------------------------------------------------------


class Recorder(StepCallback):
    """Records the steps that it runs after."""

    def __init__(self, every_n_steps: int, evaluates: bool) -> None:
        super().__init__(every_n_steps)
        self.evaluates = evaluates
        self.steps: list[int] = []

    def run(self, trainer: Any, module: Any, step: int) -> None:
        self.steps.append(step)


@given(data=st.data())
def test_an_evaluation_runs_at_0_n_2n_and_the_last_step_however_often_the_run_is_cut(data):
    """A kill goes back to the last checkpoint; a signal ends the run after its step, with a checkpoint."""
    draw = data.draw
    N, M, micro_batches, steps = (draw(st.integers(*bounds)) for bounds in ((0, 9), (1, 9), (1, 3), (1, 20)))
    module, stop = GPTModule(GPTConfig(1, 1, 1, 1, 1)), StopOnSignal()
    logged: list[int] = []  # as a reader of the logs sees it
    saved, state, postponed = 0, None, None
    while True:
        evaluation, checkpoint = Recorder(N, evaluates=True), Recorder(M, evaluates=False)
        if state is not None:
            evaluation.load_state_dict(state)
        logged = [step for step in logged if step <= saved and state is not None]  # without a checkpoint it starts anew
        callbacks, stop.signal = [stop, evaluation, checkpoint], 0
        trainer: Any = SimpleNamespace(global_step=saved, max_steps=steps, should_stop=False, callbacks=callbacks)
        for callback in callbacks[1:]:
            callback.on_train_start(trainer, module)
        killed = draw(st.none() | st.integers(0, 3 * micro_batches * steps))  # after so many micro-batches
        signalled = draw(st.none() | st.integers(saved + 1, steps + 1))  # in this step
        count = 0
        while trainer.global_step < steps and not trainer.should_stop and count != killed:
            count += 1
            if count % micro_batches == 0:
                trainer.global_step += 1
                if trainer.global_step == signalled:
                    stop.signal, trainer.should_stop = signal.SIGTERM, True
            for callback in callbacks[1:]:
                callback.on_train_batch_end(trainer, module, None, None, count)
            if checkpoint.steps[-1:] == [trainer.global_step]:
                saved, state = trainer.global_step, evaluation.state_dict()
                postponed = saved if trainer.should_stop else None
        ended = trainer.global_step == steps and count != killed
        if ended or trainer.should_stop:
            for callback in callbacks[1:]:
                callback.on_train_end(trainer, module)
            saved, state, postponed = trainer.global_step, evaluation.state_dict(), trainer.global_step
        assert evaluation.steps == sorted(set(evaluation.steps))
        # what a signal postponed may have been made up for before a kill, and then comes twice
        assert set(evaluation.steps) & set(logged) <= {postponed}
        logged += [step for step in evaluation.steps if step not in logged]
        if ended:
            break
    assert logged == (sorted({*range(0, steps, N), steps}) if N else [])
