"""The processes of a job: those that torchrun, SLURM or Lightning started, on one node or several."""

import os
import subprocess
import threading
import time
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer

from gpt2_lightning.errors import UserError

UNSUPPORTED_STRATEGIES = {
    "fsdp": "flattens the parameters, so their shapes no longer tell which ones decay: give fully_shard",
    "modelparallel": "lets the processes of one node train apart: give fully_shard",
    "deepspeed": "writes checkpoints that only DeepSpeed opens: give ddp, or fully_shard if memory is short",
    "ddp_": "(spawn, fork and notebook) starts processes that no signal can stop at a step: give ddp",
    "single_device": "trains on one device whatever trainer.devices says: leave it out",
}
"""Lightning's strategies that a run cannot use, by the beginning of their names, and the reason."""


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy that would train wrongly. Lightning itself refuses names that it does not know.

    Args:
        strategy: ``trainer.strategy`` of a recipe: a name, or a class_path with its init_args.

    Raises:
        UserError: it is one of ``UNSUPPORTED_STRATEGIES``.
    """
    name = strategy if isinstance(strategy, str) else strategy.class_path
    kind = name.rpartition(".")[2].removesuffix("Strategy").lower()
    if not isinstance(strategy, str) and strategy.init_args.get("start_method", "popen") != "popen":
        kind = f"ddp_{strategy.init_args.start_method}"
    for beginning, reason in UNSUPPORTED_STRATEGIES.items():
        if kind.startswith(beginning):
            raise UserError(f"trainer.strategy {name} {reason}")


def check_world_size(trainer: Trainer) -> None:
    """Compare the processes that the launcher started with those the Trainer expects.

    If they differ, each process would train alone, or wait for others that never come.

    Raises:
        UserError: with the flags that fit what was started.
    """
    expected = trainer.num_devices * trainer.num_nodes
    if "WORLD_SIZE" in os.environ:  # set by torchrun, Kubernetes and others, of which Lightning knows torchrun alone
        launcher, world_size = "the launcher (WORLD_SIZE)", int(os.environ["WORLD_SIZE"])
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", min(world_size, trainer.num_devices)))
    elif SLURMEnvironment.detect():
        launcher, world_size = "SLURM", int(os.environ["SLURM_NTASKS"])
        per_node = world_size // int(os.environ.get("SLURM_NNODES", trainer.num_nodes))
    else:
        return
    if (world_size, per_node) != (expected, trainer.num_devices):
        nodes = world_size // max(1, per_node)
        strategy = " --trainer.strategy ddp" if world_size > 1 else ""
        raise UserError(
            f"{launcher} started {world_size} processes on {nodes} node(s), but the Trainer expects {expected} "
            f"({trainer.num_devices} on each of {trainer.num_nodes}): give --trainer.devices {per_node} "
            f"--trainer.num_nodes {nodes}{strategy}, or start {expected} processes"
        )


def check_nodes(trainer: Trainer) -> None:
    """Print where the nodes of a job meet, for they wait for each other silently, for half an hour.

    Raises:
        UserError: this node was not told where, or which one it is; each node would call itself node 0.
    """
    cluster: Any = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes == 1 or cluster is None:
        return
    if isinstance(cluster, LightningEnvironment):
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"trainer.num_nodes is {trainer.num_nodes} and {', '.join(missing)} is not set: set MASTER_ADDR, "
                "MASTER_PORT and NODE_RANK on each node, or start it with torchrun or srun"
            )
    if cluster.local_rank() == 0:
        rank, address = cluster.node_rank(), f"{cluster.main_address}:{cluster.main_port}"
        doing = f"waiting for the others at {address}" if rank == 0 else f"connecting to node 0 at {address}"
        print(f"node {rank} of {trainer.num_nodes}: {doing}", flush=True)


def is_rank0() -> bool:
    """Whether this process is rank 0 of its job, before there is a Trainer that knows."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


def end_with_launcher() -> None:
    """End a rank that Lightning's launcher started when the launching process has died.

    Once the ranks are connected, the lost connection does this; before, the rank would wait for half an hour.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["GPT2_LAUNCHER_PID"] = str(os.getpid())  # for the ranks that this process may start
        return
    launcher = int(os.environ.get("GPT2_LAUNCHER_PID", os.getpid()))
    if launcher == os.getpid() or TorchElasticEnvironment.detect():  # torchrun watches its workers itself
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def requeue() -> None:
    """Put this SLURM job, or its task of an array, back into the queue."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:  # a container often has no scontrol
        print(f"could not requeue SLURM job {job} ({error}): submit it again")
    else:
        print(f"requeued SLURM job {job}")
