"""Validation loss during training: when it is measured. See ``evals/validation.py`` for what is measured."""

from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.evals.validation import validation_loss
from gpt2_lightning.module import GPTModule, record


class ValidationLoss(StepCallback):
    """Logs ``val/loss`` in nats per token.

    Args:
        every_n_steps: optimizer steps between two validations; 0 = off.
        tokens: number of tokens to validate on, over all devices (at most those of the validation split).
    """

    label = "validation"

    def __init__(self, every_n_steps: NonNegativeInt = 250, tokens: PositiveInt = 10485760) -> None:
        super().__init__(every_n_steps)
        self.tokens = tokens  # for the command line, which passes it to the data module

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        batches = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        with trainer.precision_plugin.val_step_context():
            loss = validation_loss(lambda ids: module.next_token_loss(ids.long()), batches, module.device)
        record(trainer, {"val/loss": loss}, step)
        module.print(f"step {step:5d} | val/loss {loss:.4f}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # `gpt2 validate`
            pl_module.print(f"val/loss {trainer.callback_metrics['val/loss']:.4f}")
