"""A job around a run: the processes that a launcher started, the folder that they share, and what comes after them."""

import ctypes
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from gpt2_lightning.callbacks.metrics import StepMetrics
from gpt2_lightning.callbacks.micro_batch import AutoMicroBatch
from gpt2_lightning.callbacks.signals import StopOnSignal
from gpt2_lightning.callbacks.time_spent import TimeSpent
from gpt2_lightning.checkpoints.ours import saved_steps, torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import try_lock

Resume = Literal["auto", "must", "never"]

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 2**31,  # never: ValidationLoss counts optimizer steps, Lightning micro-batches
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the batch samplers deal out to the ranks themselves, and pad nothing
    "enable_model_summary": False,
}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, in bytes


def run_callbacks() -> list[Callback]:
    """What every training run has in front of the callbacks that evaluate."""
    return [StopOnSignal(), TimeSpent(), StepMetrics(), AutoMicroBatch()]


def _unless_told_elsewhere(before: Callable[[Any], Any], args: threading.ExceptHookArgs) -> None:
    """TensorBoard raises an error of its writing thread once more where it is given the next value."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        before(args)


def silence_libraries() -> None:
    """Lightning's tips and warnings that are none here: what a run is, it says itself."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    if getattr(threading.excepthook, "func", None) is not _unless_told_elsewhere:
        threading.excepthook = partial(_unless_told_elsewhere, threading.excepthook)
    for name in ("lightning.pytorch", "lightning.fabric"):  # tips and the like: what a run is, it says itself
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*does not have many workers.*"
    )  # a micro-batch is read in less than a millisecond
    warnings.filterwarnings("ignore", ".*have no logger configured.*")  # `validate` writes into no run's events
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # other callbacks are obeyed
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning against torch 2.13
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it is: it starts at global_step


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, which needs the same again.

    By itself it gives large blocks back to the kernel, whose fresh pages cost a small model on a CPU a tenth of its
    step. Whoever has set MALLOC_… or GLIBC_TUNABLES is obeyed. Other systems' allocators are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes; larger blocks stay the kernel's
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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


REFUSED_STRATEGIES = {
    "fsdp": "flattens the parameters, so that their shapes no longer tell which are decayed: give fully_shard",
    "modelparallel": "leaves each process of a node to train alone: give fully_shard",
    "deepspeed": "writes checkpoints that only DeepSpeed opens: give ddp, or fully_shard where memory is short",
    "ddp_spawn": "cannot hand the run to the processes that it spawns: give ddp",
    "ddp_fork": "is for notebooks, and no signal would stop its processes at a step: give ddp",
    "ddp_notebook": "is for notebooks, and no signal would stop its processes at a step: give ddp",
    "single_device": "is what one device gets without it, and more devices would be ignored: leave it out",
}
"""Lightning's strategies that this package does not train with, by how their names begin, and the mend."""


REFUSED_SETTINGS = {
    "min_steps": "would keep a run from stopping: leave it out",
    "min_epochs": "would keep a run from stopping: leave it out",
    "max_epochs": "counts nothing here, for a run is one epoch: give trainer.max_steps",
    "val_check_interval": "counts micro-batches: give validation.every_n_steps",
    "check_val_every_n_epoch": "counts epochs, of which a run is one: give validation.every_n_steps",
    "use_distributed_sampler": "would deal out the samples a second time: leave it out",
    "default_root_dir": "is the folder of the run: give run_dir",
}
"""Settings of Lightning's Trainer that a run here cannot obey, and the mend."""


def check_trainer_settings(trainer: Any) -> None:
    """Compares the ``trainer`` section of a recipe with what a run can obey, before anything is made.

    Raises:
        ValueError: a setting counts something else than optimizer steps, is below 0, or keeps 16-bit weights.
    """
    if not 1 <= trainer.max_steps < 2**40:  # a length has to fit 64 bits
        is_what = "not set" if trainer.max_steps == -1 else trainer.max_steps
        raise UserError(f"trainer.max_steps is {is_what}: give the number of optimizer steps of the whole run")
    if str(trainer.precision) in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision {trainer.precision} keeps the weights themselves in 16 bits, where small updates are "
            f"lost: give {trainer.precision.replace('true', 'mixed')}"
        )
    for name, why in REFUSED_SETTINGS.items():
        harmless = {"min_steps": 0, "min_epochs": 0, "max_epochs": 1}.get(name)
        if trainer[name] not in (None, TRAINER_DEFAULTS.get(name), harmless, -1):  # -1: of epochs without an end
            raise UserError(f"trainer.{name} {why}")
    for name in ("gradient_clip_val", "log_every_n_steps"):  # a norm below 0 would turn the gradients round
        if not (trainer[name] or 0) >= 0:
            raise UserError(f"trainer.{name} is {trainer[name]}: give a number above 0, or 0 for never")


def check_strategy(strategy: str | Strategy) -> None:
    """Before the trainer is made, which would set some up, and would say of others only that a GPU is missing.

    Raises:
        ValueError: this package does not train with it, or there is none of that name.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    kind = name.rpartition(".")[2].removesuffix("Strategy").lower()
    if getattr(strategy, "_start_method", "popen") != "popen":  # of DDPStrategy
        kind = f"ddp_{strategy._start_method}"  # type: ignore[union-attr]
    for beginning, why in REFUSED_STRATEGIES.items():
        if kind.startswith(beginning):
            raise UserError(f"trainer.strategy {name} {why}")
    registered = not isinstance(strategy, str) or strategy in ("auto", *StrategyRegistry) or name.endswith("Strategy")
    if "xla" in kind or "tpu" in kind or not registered:
        raise UserError(
            f"trainer.strategy {name} is none of those that train here: give auto, ddp or fully_shard, or leave it out"
        )


def check_world_size(trainer: Trainer) -> None:
    """Compares the processes that were started with those the trainer was told of; apart, each would train alone.

    Raises:
        ValueError: they differ, with the flags that agree.
    """
    asked = (trainer.num_devices, trainer.num_nodes)
    if "WORLD_SIZE" in os.environ:
        if not {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"} & os.environ.keys():
            raise UserError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set and no launcher started this process: it is left over "
                "from something else, so run `unset WORLD_SIZE` first, or start this with torchrun"
            )
        launcher, world = "torchrun", int(os.environ["WORLD_SIZE"])
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", min(world, asked[0])))
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        launcher, world = "SLURM", int(os.environ["SLURM_NTASKS"])
        devices = world // int(os.environ.get("SLURM_NNODES", asked[1]))
    else:
        return
    started = (devices, world // max(1, devices))
    if started != asked or world != asked[0] * asked[1]:
        raise UserError(
            f"{launcher} started {world} processes, {devices} on each of {started[1]} nodes, and the trainer is set to "
            f"{asked[0]} devices on each of {asked[1]} nodes: give --trainer.devices {devices} --trainer.num_nodes "
            f"{started[1]}{' --trainer.strategy ddp' if world > 1 else ''}, or start as many as that"
        )


def check_nodes(trainer: Trainer) -> None:
    """Says where the nodes of a job wait for each other, which they do in silence, for half an hour.

    Raises:
        ValueError: this node was not told where, or which one it is.
    """
    cluster: Any = trainer.strategy.cluster_environment if hasattr(trainer.strategy, "cluster_environment") else None
    if trainer.num_nodes == 1 or cluster is None:
        return
    if isinstance(cluster, LightningEnvironment):  # no launcher told them: by itself each node would call itself node 0
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"trainer.num_nodes is {trainer.num_nodes}, and {', '.join(missing)} is not set: on every node set "
                "MASTER_ADDR (of node 0) and MASTER_PORT (a free one there) alike, and NODE_RANK to its number from 0 "
                "on, or start it with torchrun"
            )
        ranks, ports = range(trainer.num_nodes), range(1, 2**16)
        for name, valid in (("NODE_RANK", ranks), ("MASTER_PORT", ports)):
            if not os.environ[name].isdecimal() or int(os.environ[name]) not in valid:
                raise UserError(
                    f"{name} is {os.environ[name]}: on {trainer.num_nodes} nodes give it a number from {valid[0]} to "
                    f"{valid[-1]}"
                )
    if cluster.local_rank() == 0:
        node, at = cluster.node_rank(), f"{cluster.main_address}:{cluster.main_port}"
        waits = f"waiting for the others at {at}" if node == 0 else f"connecting to node 0 at {at}"
        print(f"node {node} of {trainer.num_nodes}: {waits}", flush=True)


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
        raise UserError(
            f"{checkpoints} cannot be written to ({error.strerror}): give this user the right to, or choose another "
            "run_dir"
        ) from None
    if not try_lock(file, of_process=True):
        file.close()
        raise UserError(
            f"another `gpt2 fit` is running in {run_dir}: wait until it has ended, or choose another run_dir"
        )
    for half_written in checkpoints.glob(".*.tmp"):
        half_written.unlink()
    return file


def checkpoint_to_resume(run_dir: Path, resume: Resume, typed: Path | None = None) -> Path | None:
    """The checkpoint that a run in this folder goes on from, None where it begins.

    ``typed`` is the user's own choice: one of this folder's, to go back to, or another run's to begin with. The same
    command, typed again or requeued, goes on from what it has saved since, which says that it came from there.

    Raises:
        ValueError: ``resume`` is must and there is none, or never and there is one.
    """
    folder = run_dir / "checkpoints"
    last = folder / "last.ckpt"
    found = last if last.exists() else next(reversed(saved_steps(folder)), None)
    if resume == "never" and found is not None:
        raise UserError(f"{found} exists and resume is never: choose another run_dir, or --resume auto to go on")
    if resume == "must" and found is None:
        raise UserError(f"{last} does not exist and resume is must: check run_dir, or --resume auto to start")
    if typed is not None and (found is None or (_is_in(typed, folder) and _ckpt_path_of(found) != str(typed))):
        return typed
    return found


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def _ckpt_path_of(checkpoint: Path) -> str | None:
    """The ``--ckpt_path`` that the run which saved it was started with."""
    try:
        return torch_load(checkpoint).get("ckpt_path")
    except ValueError:  # damaged, which may be why another one is typed
        return None


def check_seed(checkpoint: dict[str, Any], seed: int | bool) -> None:
    """Compares ``seed_everything`` with that of the run: the weights were drawn with it, and stay.

    Raises:
        ValueError: they differ.
    """
    began = checkpoint.get("seed_everything")
    if began is not None and type(seed) is int and began != seed:
        raise UserError(f"the run began with seed_everything={began}, not {seed}: give that one, or another run_dir")


def check_optimizer(checkpoint: dict[str, Any], class_path: str) -> None:
    """Compares the optimizer with that of the run, whose state another could not take over.

    Raises:
        ValueError: their classes have other names.
    """
    began, now = checkpoint.get("optimizer"), class_path.rpartition(".")[2]
    if began is not None and began != now:
        raise UserError(
            f"the run was trained with {began}, not {now}: give that one, or start from its weights with "
            "--model.init_from in another run_dir"
        )


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
