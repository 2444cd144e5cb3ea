"""The folder of a run: one job at a time, what a start leaves there, and the checkpoint that it resumes from."""

import tempfile
from pathlib import Path
from typing import IO, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from gpt2_lightning.callbacks.log_txt import LogTxt
from gpt2_lightning.checkpoints.ours import saved_steps, torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file, try_lock

Resume = Literal["auto", "must", "never"]


def claim(run_dir: Path) -> IO[bytes]:
    """Lock a run's folder for this job, create it if needed, and delete what a killed job left half written.

    Returns:
        The lock; closing it releases the folder.

    Raises:
        UserError: another job trains in it, or it is not writable.
    """
    checkpoints = run_dir / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=checkpoints).close()  # find a read-only folder now, not at the first checkpoint
        lock = (run_dir / ".lock").open("ab")
    except OSError as error:
        raise UserError(
            f"cannot write to {checkpoints} ({error.strerror}): change its permissions or choose another run_dir"
        ) from None
    if not try_lock(lock, of_process=True):
        lock.close()
        raise UserError(f"another `gpt2 fit` is running in {run_dir}: wait for it, or choose another run_dir")
    for half_written in checkpoints.glob(".*.tmp"):
        half_written.unlink()
    return lock


def checkpoint_to_resume(run_dir: Path, resume: Resume, given: Path | None = None) -> Path | None:
    """The checkpoint that a run in this folder resumes from, or None to start at step 0.

    Args:
        run_dir: folder of the run.
        resume: resume if there is a checkpoint, only if there is one, or never.
        given: the user's ``--ckpt_path``: an earlier checkpoint of this run to go back to, or another run's to begin
            with. The same command, typed again or requeued, resumes from what the run has saved since.

    Raises:
        UserError: ``resume`` is must and there is no checkpoint, or never and there is one.
    """
    folder = run_dir / "checkpoints"
    last = folder / "last.ckpt"
    found = last if last.exists() else next(reversed(saved_steps(folder)), None)
    if resume == "never" and found is not None:
        raise UserError(f"{found} exists and resume is never: choose another run_dir, or --resume auto to resume")
    if resume == "must" and found is None:
        raise UserError(f"{last} does not exist and resume is must: check run_dir, or --resume auto to start")
    if given is None or (found is not None and given.resolve().parent != folder.resolve()):
        return found
    return given if found is None or _ckpt_path_of(found) != str(given) else found


def _ckpt_path_of(checkpoint: Path) -> str | None:
    """The ``--ckpt_path`` of the start that saved this checkpoint."""
    try:
        return torch_load(checkpoint).get("ckpt_path")
    except UserError:  # damaged, which may be why the user goes back to an earlier one
        return None


def check_seed(checkpoint: dict[str, Any], seed: int | bool) -> None:
    """Raises UserError if ``seed_everything`` is not the one that the run's weights were drawn with."""
    saved = checkpoint.get("seed_everything")
    if saved is not None and type(seed) is int and saved != seed:
        raise UserError(f"the run began with seed_everything={saved}, not {seed}: give that one, or another run_dir")


def check_optimizer(checkpoint: dict[str, Any], class_path: str) -> None:
    """Raises UserError if the run was trained with another optimizer, whose state this one could not load."""
    saved, given = checkpoint.get("optimizer"), class_path.rpartition(".")[2]
    if saved is not None and saved != given:
        raise UserError(
            f"the run was trained with {saved}, not {given}: give that one, or start from its weights with "
            "--model.init_from in another run_dir"
        )


def loggers(run_dir: Path, resumed_step: int) -> list[Logger]:
    """TensorBoard's events and ``log.txt``, both in the run's folder: all starts of a run make one curve."""
    # a validation at the resumed step came before its checkpoint and stays; what came after is logged again
    purge_step = resumed_step + 1 if resumed_step else 0
    events = TensorBoardLogger(
        run_dir.parent,
        run_dir.name,
        version="",
        default_hp_metric=False,
        purge_step=purge_step,
        filename_suffix=f".start{len(list(run_dir.glob('events.out.tfevents.*')))}",  # orders them whatever the clock
    )
    return [events, LogTxt(run_dir, resumed_step)]


class SaveConfig(Callback):
    """Writes the resolved config of each start into the run's folder: config.yaml, config_1.yaml, …

    Lightning's SaveConfigCallback writes before the checkpoint is loaded; a start that is refused should leave nothing.
    """

    def __init__(self, parser: Any, config: Any) -> None:
        self.parser = parser
        self.config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder, number = Path(trainer.default_root_dir), 0
        while (path := folder / (f"config_{number}.yaml" if number else "config.yaml")).exists():
            number += 1
        config = self.config.clone()
        config.model.config = pl_module.hparams["config"]  # the weights' own where it was null
        config.ckpt_path = None  # of this start alone: the saved config is a recipe for other runs too
        with atomic_file(path) as file:
            file.write(self.parser.dump(config, skip_none=False, skip_validation=True).encode())
