"""Fully sharded training (FSDP2): each device keeps 1/W of the weights, gradients and optimizer state."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from gpt2_lightning.checkpoints.ours import torch_load
from gpt2_lightning.model import GPT


class FullyShard(ModelParallelStrategy):
    """``--trainer.strategy fully_shard``: each device keeps 1/W of the model and gathers one block at a time.

    Steps and checkpoint files are the same as DDP's, and losses agree to rounding, so a run may change between the two.
    """

    def __init__(self, timeout: timedelta = default_pg_timeout) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        # Lightning's "auto" is the number of nodes: it expects the devices of a node to be tensor-parallel. There is
        # no public way to set it here, where the number of processes is known.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load an ordinary checkpoint by parameter names. Lightning's own method reads only its sharded format."""
        assert self.model is not None
        checkpoint = torch_load(Path(checkpoint_path))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if not state["state"]:  # plain SGD: nothing to shard
                optimizer.load_state_dict(state)
                continue
            groups = state["param_groups"]
            names = {i: name for g in groups for i, name in zip(g["params"], g["param_names"], strict=True)}
            by_name: dict[str, Any] = {
                "state": {names[i]: values for i, values in state["state"].items()},
                "param_groups": [g | {"params": [names[i] for i in g["params"]]} for g in groups],
            }
            set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
        return checkpoint


StrategyRegistry.register("fully_shard", FullyShard, description=FullyShard.__doc__ or "")


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """Shard the parameters over the ranks of ``mesh``: each block by itself, what lies outside them together."""
    for block in model.transformer["h"]:  # type: ignore[attr-defined, union-attr]
        fully_shard(block, mesh=mesh)
    # the embedding is also the head, needed at both ends of the forward pass: keep it until the backward pass
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")  # training and evaluation call it instead of `forward`


@contextmanager
def gathered(model: GPT) -> Iterator[None]:
    """Keep the whole model on each rank meanwhile, so that one rank can run it alone. No effect on an unsharded one."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
