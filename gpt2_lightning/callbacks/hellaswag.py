"""HellaSwag during training, and at the end of ``gpt2 validate``."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from gpt2_lightning.callbacks.steps import EveryNSteps, record
from gpt2_lightning.evals.hellaswag import Examples, Score, Style, evaluate, load_examples, render
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tokenizer import VOCAB_SIZE


class HellaSwag(EveryNSteps):
    """Scores the plain model, the rows dealt out to the ranks.

    Logs ``hellaswag/acc`` and ``hellaswag/acc_norm`` in ``nanogpt`` style, ``hellaswag_harness/…`` in ``harness``
    style: the two are not to meet in one chart.

    Args:
        every_n_steps: optimizer steps between two evaluations; 0 = off.
        style: nanogpt (build-nanogpt's completion style) or harness (lm-evaluation-harness); they differ by 1.6 points.
        path: HellaSwag's .jsonl file; null asks the Hugging Face hub, and uses the built-in questions where there is
            none; ``builtin`` asks nobody.
    """

    section = "hellaswag"
    label = "HellaSwag"

    def __init__(self, every_n_steps: int = 250, style: Style = "nanogpt", path: str | None = None) -> None:
        super().__init__(every_n_steps)
        self.style: Style = style
        self.path = path
        self.tag = "hellaswag" if style == "nanogpt" else f"hellaswag_{style}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, GPTModule)
        if self.every_n_steps == 0:
            return
        if pl_module.model.config.vocab_size < VOCAB_SIZE:
            pl_module.print(
                f"HellaSwag is off: it needs GPT-2's BPE, and model.config.vocab_size="
                f"{pl_module.model.config.vocab_size} is below {VOCAB_SIZE}"
            )
            self.every_n_steps = 0
            return
        if self.path is None:  # one rank asks the hub, for it may answer one and not another
            asked: Any = load_examples() if trainer.is_global_zero else None
            self.examples: Examples = trainer.strategy.broadcast(asked)
        else:
            self.examples = load_examples(self.path)
        render(self.examples.rows[0], self.style)  # rows that lack what the style needs are refused now, not at step 0
        pl_module.print(f"HellaSwag: {self.examples.tag}{self.examples.note and f' ({self.examples.note})'}")

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
        """The score over all ranks, added up as integers."""
        with trainer.precision_plugin.val_step_context():
            mine = evaluate(
                module.model,
                self.examples,
                self.style,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
        counts = torch.tensor([mine.n, mine.correct, mine.correct_norm], device=module.device)
        return Score(*trainer.strategy.reduce(counts, reduce_op="sum").tolist())

    def values(self, score: Score) -> dict[str, float]:
        return {f"{self.tag}/acc": score.acc, f"{self.tag}/acc_norm": score.acc_norm}

    def describe(self, score: Score) -> str:
        return (
            f"{self.tag}/acc_norm {score.acc_norm:.4f} ± {score.stderr:.4f}, acc {score.acc:.4f} "
            f"({self.style} style, {self.examples.tag})"
        )

    def state_dict(self) -> dict[str, Any]:
        """With what was scored, for an export's model card."""
        return super().state_dict() | ({"examples": self.examples.tag} if self.every_n_steps else {})
