"""Loss or gradients that overflow: the module leaves such a step out; this says so, and ends a run of them."""

from typing import Any

from lightning.pytorch import Trainer

from gpt2_lightning.callbacks.each_step import EachStep
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.module import GPTModule


class NonFinite(EachStep):
    """Names each step whose loss or gradient norm was not finite, and ends the run after several in a row.

    Args:
        stop_after: how many in a row end the run; 0 = never.
    """

    def __init__(self, stop_after: int = 10) -> None:
        if stop_after < 0:
            raise UserError(f"nonfinite.stop_after is {stop_after}: give a number of steps in a row, or 0 for never")
        self.stop_after = stop_after
        self.in_a_row = 0

    def after_step(self, trainer: Trainer, module: GPTModule, steps: int) -> None:
        if module.step_applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenDataModule)
        step = steps - 1
        first, end = (data.tokens_before(s) // data.train.block_size for s in (step, step + 1))
        what = (
            f"step {step}: loss {float(module.step_loss):.4g}, gradient norm {float(module.grad_norm):.4g} "
            f"(samples {first} to {end - 1})"
        )
        if 0 < self.stop_after <= self.in_a_row:
            raise UserError(
                f"{what}: {self.in_a_row} steps in a row were not finite and not applied; look at the text with "
                f"`gpt2 prepare --show {trainer.default_root_dir} --step {step}`, lower the learning rate, or raise "
                "nonfinite.stop_after"
            )
        module.print(f"{what}: not finite, not applied")

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row = state_dict["in_a_row"]
