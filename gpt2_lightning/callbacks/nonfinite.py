"""Steps whose loss or gradients overflow: ``module.py`` leaves them out; this reports them and may end the run."""

from typing import Any

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Trainer

from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.module import GPTModule


class NonFinite(StepCallback):
    """Reports each step whose loss or gradient norm is not finite, and ends the run after several in a row.

    Args:
        stop_after: how many such steps in a row end the run; 0 = never.
    """

    evaluates = False

    def __init__(self, stop_after: NonNegativeInt = 10) -> None:
        super().__init__(every_n_steps=1)
        self.stop_after: int = stop_after
        self.in_a_row = 0

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if module.step_applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenDataModule)
        first, end = (data.tokens_before(s) // data.train.block_size for s in (step - 1, step))
        message = (
            f"step {step - 1}: loss {float(module.step_loss):.4g}, gradient norm {float(module.grad_norm):.4g} "
            f"(sequences {first} to {end - 1})"
        )
        if 0 < self.stop_after <= self.in_a_row:
            raise UserError(
                f"{message}: {self.in_a_row} steps in a row were not finite and not applied; look at the text with "
                f"`gpt2 prepare --show {trainer.default_root_dir} --step {step - 1}`, lower the learning rate, or "
                "raise nonfinite.stop_after"
            )
        module.print(f"{message}: not finite, not applied")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.in_a_row = state_dict["in_a_row"]
