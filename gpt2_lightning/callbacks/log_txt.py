"""``log.txt`` as build-nanogpt writes it, ``<step> train|val|hella <value>`` a line, for the notebooks that read it."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

LINES = {"val/loss": ("val", ".4f"), "hellaswag/acc_norm": ("hella", ".4f"), "train/loss": ("train", ".6f")}


class LogTxt(Logger):
    """Appends to ``log.txt`` in the run's folder; a line is on disk when the step is over."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "log.txt"

    @property
    def name(self) -> str:
        return "log.txt"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        lines = [f"{step} {word} {metrics[key]:{form}}\n" for key, (word, form) in LINES.items() if key in metrics]
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(lines)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is in ``config*.yaml``."""
