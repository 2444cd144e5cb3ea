"""``log.txt`` as build-nanogpt writes it, ``<step> train|val|hella <value>`` a line, for the notebooks that read it."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gpt2_lightning.data.shards import atomic_file

LINES = {"val/loss": ("val", ".4f"), "hellaswag/acc_norm": ("hella", ".4f"), "train/loss": ("train", ".6f")}


class LogTxt(Logger):
    """Appends to ``log.txt`` in the run's folder; a line is on disk when the step is over.

    A run that goes on from ``resumed_step`` drops what was written after that checkpoint, for it comes again.
    """

    def __init__(self, run_dir: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = run_dir / "log.txt"
        self.resumed_step = resumed_step

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
            if self.resumed_step and self.path.exists():
                self._drop_what_comes_again()
            self.resumed_step = 0
            with self.path.open("a") as file:
                file.writelines(lines)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is in ``config*.yaml``."""

    def _drop_what_comes_again(self) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        with atomic_file(self.path) as file:
            for line in lines:
                step, word, _ = line.split(" ", 2)
                # evaluations at the resumed step came before its checkpoint, training from it on after
                if int(step) < self.resumed_step + (word != "train"):
                    file.write(line.encode())
