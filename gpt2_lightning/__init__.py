"""GPT-2 reproduced from scratch on PyTorch Lightning.

The names below are imported on first use, so that ``gpt2 --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_lightning.checkpoints.load import load
    from gpt2_lightning.model import GPT, GPTConfig

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "load"]

_MODULES = {"GPT": "model", "GPTConfig": "model", "load": "checkpoints.load"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
