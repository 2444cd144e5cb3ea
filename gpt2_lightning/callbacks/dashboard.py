"""What TensorBoard shows beside the curves: the run's settings, published figures in its charts, what HellaSwag is."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gpt2_lightning.callbacks.hellaswag import HellaSwag
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tools.references import HELLASWAG, HELLASWAG_EXAMPLES, VAL_LOSS, VAL_LOSS_SOURCE
from gpt2_lightning.tools.runs import MAIN_SETTINGS, flat

SELDOM_CHANGED = {"betas", "devices", "eps", "gradient_clip_val", "num_nodes", "root", "strategy", "validation_tokens"}
"""Left out of TensorBoard's table, which sorts by name and shows five columns: among them are lr and max_steps."""


class Dashboard(Callback):
    """Writes into the run's own event file, so that TensorBoard's hyper-parameters are no runs of their own.

    Of the settings of several starts TensorBoard shows the first's; what a later one changed, ``gpt2 report`` tells.

    A chart's lines are tags, so the published figures are tags as well: ``yardstick/…``, which TensorBoard sorts behind
    ``val/…``, with a value at each validation, so that they are as long as the curves.

    Args:
        config: the settings of this start, nested as in a recipe.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.yardsticks: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTModule)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        scores = [callback for callback in callbacks if isinstance(callback, HellaSwag) and callback.every_n_steps > 0]
        tags = [callback.tag for callback in scores]
        settings = flat(self.config | {"model": self.config["model"] | {"config": pl_module.hparams["config"]}})
        self.yardsticks = published(settings.get("data.source"), tags)  # data may be a class of the user's own
        main = {name: value for name, value in settings.items() if MAIN_SETTINGS.fullmatch(name) and value != "null"}
        # short, for a narrow table; of two max_steps the trainer's, which comes first
        short = {name.rpartition(".")[2]: _number(value) for name, value in reversed(main.items())}
        shown = {name: value for name, value in short.items() if name not in SELDOM_CHANGED}
        metrics = dict.fromkeys(["val/loss", *(f"{tag}/acc_norm" for tag in tags)], 0)  # the last value of each
        experiment, start, _ = hparams(shown, metrics)
        for writer in _writers(trainer):
            writer.file_writer.add_summary(experiment)  # type: ignore[attr-defined]
            writer.file_writer.add_summary(start)  # type: ignore[attr-defined]
            writer.add_custom_scalars(layout(tags))
            for callback in scores:  # a score says little without how many questions it is of
                writer.add_text(f"{callback.tag}/examples", callback.examples.tag, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer in _writers(trainer):
            for tag, figure in self.yardsticks.items():
                writer.add_scalar(tag, figure, trainer.global_step)


def published(source: str | None, tags: list[str]) -> dict[str, float]:
    """The figures that belong beside a run's curves, under tags that say what they are of.

    Args:
        source: the run's ``data.source``.
        tags: of the styles of HellaSwag that it is scored in.
    """
    figures = {f"yardstick/val_loss/{name}": loss for name, loss in VAL_LOSS.items() if source == VAL_LOSS_SOURCE}
    for tag in tags:
        figures |= {f"yardstick/{tag}_{HELLASWAG_EXAMPLES}_rows/{name}": acc for name, acc in HELLASWAG[tag].items()}
    return {tag.replace(" ", "_"): figure for tag, figure in figures.items()}


def layout(tags: list[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's page of custom scalars: charts whose lines are all the tags that fit an expression."""
    charts = {"loss": ["Multiline", ["train/loss$", "val/loss$", "yardstick/val_loss/"]]}
    for tag in tags:
        charts[f"{tag}/acc_norm"] = ["Multiline", [f"{tag}/acc_norm$", f"yardstick/{tag}_{HELLASWAG_EXAMPLES}_rows/"]]
    return {"against published figures": charts}


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
