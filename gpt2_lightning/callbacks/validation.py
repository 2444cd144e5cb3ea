"""Validation loss at a cadence of its own: Lightning's counts micro-batches and knows neither step 0 nor the last."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from gpt2_lightning.callbacks.steps import EveryNSteps, record
from gpt2_lightning.errors import UserError
from gpt2_lightning.module import GPTModule


class ValidationLoss(EveryNSteps):
    """Logs ``val/loss``, nats per token, by Lightning's own validation loop.

    Args:
        every_n_steps: optimizer steps between two of them; 0 = off.
        tokens: how many tokens of the validation split it is measured on, over all devices (at most what is there).
    """

    section = "validation"
    label = "validation"

    def __init__(self, every_n_steps: int = 250, tokens: int = 10485760) -> None:
        super().__init__(every_n_steps)
        if tokens < 1:
            raise UserError(f"validation.tokens is {tokens}: give at least 1, or validation.every_n_steps=0 for never")
        self.tokens = tokens

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if trainer.limit_val_batches == 0:  # type: ignore[attr-defined]
            return
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter  # these lines are Lightning's own around the same call
        trainer.validating = True
        # before the first step of a resumed run the loop would go on where the last one before the checkpoint ended
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_loop_iter
        loss = trainer.callback_metrics["val/loss"].item()
        record(trainer, {"val/loss": loss}, step)
        module.print(f"step {step:5d} | val/loss {loss:.4f}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # `gpt2 validate`
            pl_module.print(f"val/loss {trainer.callback_metrics['val/loss']:.4f}")
