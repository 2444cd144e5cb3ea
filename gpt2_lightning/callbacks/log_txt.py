"""``log.txt`` in build-nanogpt's format, ``<step> train|val|hella <value>`` per line, which its notebook reads."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gpt2_lightning.files import atomic_file

STREAMS = {"val/loss": ("val", ".4f"), "hellaswag/acc_norm": ("hella", ".4f"), "train/loss": ("train", ".6f")}


class LogTxt(Logger):
    """Appends to ``log.txt`` in the run's folder, and closes it after each line.

    Args:
        run_dir: folder of the run.
        resumed_step: step that the run resumes from; lines after it are dropped, as they will be written again.
    """

    def __init__(self, run_dir: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = run_dir / "log.txt"
        self.resumed_step = resumed_step
        self.truncated = False

    @property
    def name(self) -> str:
        return "log.txt"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        lines = [f"{step} {word} {metrics[key]:{form}}\n" for key, (word, form) in STREAMS.items() if key in metrics]
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.truncated and self.path.exists():
            self._truncate_at_resume()
        self.truncated = True
        with self.path.open("a") as file:
            file.writelines(lines)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in ``config*.yaml``. Lightning requires the method."""

    def _truncate_at_resume(self) -> None:
        lines = self.path.read_text(errors="replace").splitlines()
        with atomic_file(self.path) as file:
            for line in lines:
                match = re.fullmatch(r"(\d+) (train|val|hella) \S+", line)
                # evaluations at the resumed step came before its checkpoint, the training step of that number after it
                end = self.resumed_step + (self.resumed_step > 0 and match is not None and match[2] != "train")
                if match is None or int(match[1]) < end:
                    file.write(f"{line}\n".encode())
