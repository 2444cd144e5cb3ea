"""A job around a run: the processes that a launcher started, the folder that they share, and what comes after them."""

import logging
import os
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import IO, Any, Literal

from lightning.pytorch import Callback, Trainer

from gpt2_lightning.callbacks.checkpoint import saved_steps
from gpt2_lightning.callbacks.metrics import StepMetrics
from gpt2_lightning.callbacks.micro_batch import AutoMicroBatch
from gpt2_lightning.callbacks.signals import StopOnSignal
from gpt2_lightning.callbacks.time_spent import TimeSpent
from gpt2_lightning.lock import try_lock

Resume = Literal["auto", "must", "never"]

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 2**31,  # never: ValidationLoss counts optimizer steps, Lightning micro-batches
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the batch samplers deal out to the ranks themselves, and pad nothing
    "enable_model_summary": False,
}


def callbacks_of_a_run() -> list[Callback]:
    """What every training run has in front of the callbacks that evaluate."""
    return [StopOnSignal(), TimeSpent(), StepMetrics(), AutoMicroBatch()]


def quieten() -> None:
    """Lightning's tips and warnings that are none here: what a run is, it says itself."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips and the like: what a run is, it says itself
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*does not have many workers.*"
    )  # a micro-batch is read in less than a millisecond
    warnings.filterwarnings("ignore", ".*have no logger configured.*")  # `validate` writes into no run's events
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # other callbacks are obeyed
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning against torch 2.13
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it is: it starts at global_step


def is_first_process() -> bool:
    """Whether this process is rank 0 of its job, by what torchrun, SLURM or Lightning's launcher told it."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


def end_with_launcher() -> None:
    """Lets a rank that Lightning's launcher started end when the launching rank has died.

    Once they are connected the lost connection ends it; before that it would wait for the other for half an hour.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["GPT2_LAUNCHER_PID"] = str(os.getpid())  # for the ranks that this process may launch
        return
    launcher = int(os.environ.get("GPT2_LAUNCHER_PID", os.getpid()))
    if launcher == os.getpid() or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sees to its own
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def refuse_other_world(trainer: Trainer) -> None:
    """Compares the processes that were started with those the trainer was told of; apart, each would train alone.

    Raises:
        ValueError: they differ, with the flags that agree.
    """
    asked = (trainer.num_devices, trainer.num_nodes)
    if "WORLD_SIZE" in os.environ:
        launcher, world = "torchrun", int(os.environ["WORLD_SIZE"])
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", min(world, asked[0])))
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        launcher, world = "SLURM", int(os.environ["SLURM_NTASKS"])
        devices = world // int(os.environ.get("SLURM_NNODES", asked[1]))
    else:
        return
    started = (devices, world // max(1, devices))
    if started != asked or world != asked[0] * asked[1]:
        raise ValueError(
            f"{launcher} started {world} processes, {devices} on each of {started[1]} nodes, and the trainer is set to "
            f"{asked[0]} devices on each of {asked[1]} nodes: give --trainer.devices {devices} --trainer.num_nodes "
            f"{started[1]}{' --trainer.strategy ddp' if world > 1 else ''}, or start as many as that"
        )


def claim(run_dir: Path) -> IO[bytes]:
    """Takes a run's folder for this job, makes it where it is not there, and clears away what a killed job half wrote.

    Closing the file gives the folder back.

    Raises:
        ValueError: another job has it, or it cannot be written to.
    """
    checkpoints = run_dir / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=checkpoints).close()  # a right that is missing shows now, not at the first save
        file = (run_dir / ".lock").open("ab")
    except OSError as error:
        raise ValueError(
            f"{checkpoints} cannot be written to ({error.strerror}): give this user the right to, or choose another "
            "run_dir"
        ) from None
    if not try_lock(file, of_process=True):
        file.close()
        raise ValueError(
            f"another `gpt2 fit` is running in {run_dir}: wait until it has ended, or choose another run_dir"
        )
    for half_written in checkpoints.glob(".*.tmp"):
        half_written.unlink()
    return file


def checkpoint_to_resume(run_dir: Path, resume: Resume) -> Path | None:
    """The checkpoint that a run in this folder goes on from, None where it begins.

    Raises:
        ValueError: ``resume`` is must and there is none, or never and there is one.
    """
    folder = run_dir / "checkpoints"
    last = folder / "last.ckpt"
    found = last if last.exists() else next(reversed(saved_steps(folder)), None)
    if resume == "never" and found is not None:
        raise ValueError(f"{found} exists and resume is never: choose another run_dir, or --resume auto to go on")
    if resume == "must" and found is None:
        raise ValueError(f"{last} does not exist and resume is must: check run_dir, or --resume auto to start")
    return found


def refuse_other_seed(checkpoint: dict[str, Any], seed: int | bool) -> None:
    """Compares ``seed_everything`` with that of the run: the weights were drawn with it, and stay.

    Raises:
        ValueError: they differ.
    """
    began = checkpoint.get("seed_everything")
    if began is not None and type(seed) is int and began != seed:
        raise ValueError(f"the run began with seed_everything={began}, not {seed}: give that one, or another run_dir")


def requeue() -> None:
    """Puts this SLURM job, or its task of an array, back into the queue."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:  # inside a container there is often no scontrol
        print(f"SLURM job {job} could not be requeued ({error}): submit it again")
    else:
        print(f"SLURM job {job} is back in the queue")
