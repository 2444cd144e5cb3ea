"""``data.micro_batch_size: auto``: the largest micro-batch that fits, found before the first step and kept."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.hardware import is_out_of_memory
from gpt2_lightning.module import GPTModule


class AutoMicroBatch(Callback):
    """Tries smaller micro-batches until a step fits the memory of every device.

    A resumed run keeps the size it had: another one would round differently.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, GPTModule)
        assert isinstance(data, TokenDataModule)
        if not data.auto_micro_batch:
            return
        while pl_module.device.type != "cpu" and not trainer.strategy.reduce_boolean_decision(
            fits(pl_module, data.micro_batch_size)
        ):
            smaller = data.micro_batch_sizes(data.micro_batch_size // 2)[-1]
            if smaller >= data.micro_batch_size:
                raise UserError(
                    f"a micro-batch of {data.micro_batch_size} does not fit the memory of {pl_module.device}, and no "
                    "smaller one divides the step: set model.chunked_loss to true, or train a smaller model.config"
                )
            data.set_micro_batch_size(smaller)
        trainer.accumulate_grad_batches = data.accumulate_grad_batches
        pl_module.print(
            f"micro_batch_size: auto takes {data.micro_batch_size}, {data.accumulate_grad_batches} to a step"
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined] # has taken the micro-batch of the checkpoint
        trainer.accumulate_grad_batches = data.accumulate_grad_batches


def fits(module: GPTModule, micro_batch_size: int) -> bool:
    """Try whether training steps on micro-batches of this size fit the device's memory."""
    found = True
    try:
        _try_step(module, micro_batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = False
    if not found:
        torch.compiler.reset()  # code for a size that is never used must not count towards the recompile limit
    module.zero_grad()  # after the handler: the traceback holds the activations
    garbage_collection_cuda()
    return found


def _try_step(module: GPTModule, micro_batch_size: int) -> None:
    """Need as much memory as a step at its peak: a second micro-batch on top of gradients and AdamW's two moments.

    The optimizer has no state before its first step, so two copies of the parameters stand in for it.
    """
    moments = [torch.empty_like(p) for p in module.parameters() for _ in range(2)]
    ids = torch.zeros(micro_batch_size, module.model.config.block_size + 1, dtype=torch.long, device=module.device)
    for _ in range(2):
        with module.trainer.precision_plugin.train_step_context():
            loss = module.next_token_loss(ids)
        loss.backward()
    del moments
