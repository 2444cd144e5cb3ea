"""The callbacks of a run, in the order in which they are called. `gpt2 fit`, `validate` and `bench` use this list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from gpt2_lightning.callbacks.checkpoint import StepCheckpoint
from gpt2_lightning.callbacks.hellaswag import HellaSwag
from gpt2_lightning.callbacks.metrics import StepMetrics
from gpt2_lightning.callbacks.micro_batch import AutoMicroBatch
from gpt2_lightning.callbacks.nonfinite import NonFinite
from gpt2_lightning.callbacks.progress import StepProgressBar
from gpt2_lightning.callbacks.samples import Samples
from gpt2_lightning.callbacks.signals import StopOnSignal
from gpt2_lightning.callbacks.validation import ValidationLoss
from gpt2_lightning.cli.run_folder import loggers
from gpt2_lightning.tools.gpus import peak_flops

SECTIONS: dict[str, type[Callback]] = {
    "validation": ValidationLoss,
    "hellaswag": HellaSwag,
    "samples": Samples,
    "nonfinite": NonFinite,
    "checkpoint": StepCheckpoint,  # last: it saves what the others have done
}
"""Section of a recipe → the callback that it configures."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 2**31,  # never: ValidationLoss counts optimizer steps, Lightning micro-batches
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the batch samplers split over ranks themselves, and pad nothing
    "enable_model_summary": False,
}


def run_callbacks(sections: Sequence[Callback], progress_bar: bool = True) -> list[Callback]:
    """All callbacks of a training run.

    Args:
        sections: those that the recipe configures, in the order of ``SECTIONS``.
        progress_bar: whether to show one.
    """
    return [
        *([StepProgressBar()] if progress_bar else []),
        StopOnSignal(),  # before the evaluations: what is due when a signal stops the run is left to the resumed run
        StepMetrics(peak_flops),
        AutoMicroBatch(),
        *sections,
    ]


def bench_trainer(run_dir: Path, callbacks: list[Callback], **settings: Any) -> Trainer:
    """The Trainer of ``gpt2 fit`` with all its callbacks and loggers, evaluation and checkpoints switched off."""
    sections = [ValidationLoss(0), HellaSwag(0), Samples(0), NonFinite(), StepCheckpoint(0)]
    return Trainer(
        default_root_dir=run_dir,
        logger=loggers(run_dir, resumed_step=0),
        callbacks=[*run_callbacks(sections), *callbacks],
        **TRAINER_DEFAULTS | settings,
    )
