"""HellaSwag during training, and at the end of ``gpt2 validate``."""

from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.evals.hellaswag import ExampleSet, Style, evaluate, load_examples, render
from gpt2_lightning.evals.scores import Score
from gpt2_lightning.module import GPTModule, record
from gpt2_lightning.tokenizer import VOCAB_SIZE


class HellaSwag(StepCallback):
    """Scores the model on HellaSwag, each rank a share of the examples.

    Logs ``hellaswag/acc`` and ``hellaswag/acc_norm`` in ``nanogpt`` style, ``hellaswag_harness/…`` in ``harness``
    style, so that the two do not share a chart.

    Args:
        every_n_steps: optimizer steps between two evaluations; 0 = off.
        style: nanogpt (build-nanogpt's completion style) or harness (lm-evaluation-harness); GPT-2 (124M) scores 1.6
            points higher in the latter.
        path: HellaSwag's .jsonl file, or ``builtin`` for the 48 built-in examples; null downloads HellaSwag
            from the Hugging Face hub, and uses the built-in examples if it cannot.
    """

    label = "HellaSwag"

    def __init__(self, every_n_steps: NonNegativeInt = 250, style: Style = "nanogpt", path: str | None = None) -> None:
        super().__init__(every_n_steps)
        self.style: Style = style
        self.path = path
        self.tag = "hellaswag" if style == "nanogpt" else f"hellaswag_{style}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, GPTModule)
        if self.every_n_steps == 0:
            return
        vocab_size = pl_module.model.config.vocab_size
        if vocab_size < VOCAB_SIZE:
            pl_module.print(f"HellaSwag is off: vocab_size={vocab_size} is below GPT-2's {VOCAB_SIZE}")
            self.every_n_steps = 0
            return
        if self.path is None:  # rank 0 asks the hub, which may answer one rank and not another
            loaded: Any = load_examples() if trainer.is_global_zero else None
            self.examples: ExampleSet = trainer.strategy.broadcast(loaded)
        else:
            self.examples = load_examples(self.path)
        render(self.examples.examples[0], self.style)  # raises now, not at the end of training, if a field is missing
        pl_module.print(f"HellaSwag: {self.examples.tag}{self.examples.note and f' ({self.examples.note})'}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps > 0 and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # scores of different sets cannot be compared
                    logger.experiment.add_text(f"{self.tag}/examples", self.examples.tag, 0)
        super().on_train_start(trainer, pl_module)

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        score = self.score(trainer, module)
        record(trainer, self.values(score), step)
        module.print(f"step {step:5d} | {self.describe(score)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and self.every_n_steps > 0:
            assert isinstance(pl_module, GPTModule)
            score = self.score(trainer, pl_module)
            trainer.callback_metrics.update(self.values(score))  # type: ignore[arg-type]
            pl_module.print(self.describe(score))

    def score(self, trainer: Trainer, module: GPTModule) -> Score:
        """The score over all ranks: their counts are added, so it does not depend on how many there are."""
        with trainer.precision_plugin.val_step_context():
            on_this_rank = evaluate(
                module.model,
                self.examples,
                self.style,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
        counts = [on_this_rank.n, on_this_rank.correct, on_this_rank.correct_norm]
        total = trainer.strategy.reduce(torch.tensor(counts, device=module.device), reduce_op="sum")
        return Score(*total.tolist())

    def values(self, score: Score) -> dict[str, float]:
        return {f"{self.tag}/acc": score.acc, f"{self.tag}/acc_norm": score.acc_norm}

    def describe(self, score: Score) -> str:
        return (
            f"{self.tag}/acc_norm {score.acc_norm:.4f} ± {score.stderr:.4f}, acc {score.acc:.4f} "
            f"({self.style} style, {self.examples.tag})"
        )

    def state_dict(self) -> dict[str, Any]:
        """With the set of examples, for the model card of an export."""
        return super().state_dict() | ({"examples": self.examples.tag} if self.every_n_steps else {})
