"""``log.txt`` as build-nanogpt writes it, ``<step> train|val|hella <value>`` a line, for the notebooks that read it."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gpt2_lightning.files import atomic_file

LINES = {"val/loss": ("val", ".4f"), "hellaswag/acc_norm": ("hella", ".4f"), "train/loss": ("train", ".6f")}


class LogTxt(Logger):
    """Appends to ``log.txt`` in the run's folder; a line is on disk when the step is over.

    A run that goes on from ``resumed_step``, or begins anew at 0, drops what was written after it, for it comes again.
    """

    def __init__(self, run_dir: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = run_dir / "log.txt"
        self.resumed_step = resumed_step
        self.trimmed = False

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
            if not self.trimmed and self.path.exists():
                self._truncate_at_resume()
            self.trimmed = True
            with self.path.open("a") as file:
                file.writelines(lines)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is in ``config*.yaml``."""

    def _truncate_at_resume(self) -> None:
        lines = self.path.read_text(errors="replace").splitlines()
        with atomic_file(self.path) as file:
            for line in lines:
                ours = re.fullmatch(r"(\d+) (train|val|hella) \S+", line)
                # evaluations at the resumed step came before its checkpoint, training from it on after
                before = self.resumed_step + (self.resumed_step > 0 and ours is not None and ours[2] != "train")
                if ours is None or int(ours[1]) < before:
                    file.write(f"{line}\n".encode())
