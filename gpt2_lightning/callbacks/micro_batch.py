"""The micro-batch that fits, where ``data.micro_batch_size`` is auto: found before the first step, then left alone."""

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.module import GPTModule


class AutoMicroBatch(Callback):
    """Halves the micro-batch until a step fits the memory of every device.

    A resumed run begins with the size that it had: another one would round differently.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, GPTModule)
        assert isinstance(data, TokenDataModule)
        if not data.auto_micro_batch:
            return
        while pl_module.device.type != "cpu" and not trainer.strategy.reduce_boolean_decision(
            pl_module.fits(data.micro_batch_size)
        ):
            smaller = data.micro_batch_sizes(data.micro_batch_size // 2)[-1]
            if smaller >= data.micro_batch_size:
                raise UserError(
                    f"a micro-batch of {data.micro_batch_size} does not fit the memory of {pl_module.device}, and no "
                    "smaller one divides the step: set model.chunked_loss to true, or train a smaller model.config"
                )
            data.set_micro_batch_size(smaller)
        pl_module.print(
            f"micro_batch_size: auto takes {data.micro_batch_size}, {trainer.accumulate_grad_batches} to a step"
        )
