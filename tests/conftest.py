"""Fixtures that several tests share: tiny shards, a tiny recipe, a run's logged values, a command that fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_lightning.__main__ import main

# the same examples everywhere, however slow; `pytest --hypothesis-profile=default` draws new ones
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def run_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own, without the Hugging Face hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """A folder of shards with build-nanogpt's names: random tokens below ``vocab_size``, or the tokens given."""

    def make(train: Any = 20_000, val: Any = 2_000, vocab_size: int = 64, name: str = "shards") -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / name
        root.mkdir()
        for split, number, tokens in (("val", 0, val), ("train", 1, train)):
            if isinstance(tokens, int):
                tokens = rng.integers(0, vocab_size, tokens)
            np.save(root / f"tiny_{split}_{number:06d}.npy", np.asarray(tokens, dtype=np.uint16))
        return root

    return make


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """A recipe file: a tiny model trained on ``root``; ``changes`` are merged in, section by section."""

    def write(root: Path, name: str = "tiny", **changes: Any) -> Path:
        recipe: dict[str, Any] = {
            "trainer": {"max_steps": 6, "accelerator": "cpu"},
            "model": {
                "config": {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16},
                "optimizer": {"class_path": "gpt2_lightning.optim.AdamW", "init_args": {"lr": 3e-3}},
                "lr_scheduler": {
                    "class_path": "gpt2_lightning.schedule.WarmupCosine",
                    "init_args": {"warmup_steps": 2, "min_lr": 3e-4},
                },
            },
            "data": {"root": str(root), "source": None, "total_batch_tokens": 128, "micro_batch_size": 4},
            "validation": {"every_n_steps": 3, "tokens": 512},
            "hellaswag": {"every_n_steps": 0},
            "samples": {"every_n_steps": 0},
            "checkpoint": {"every_n_steps": 3},
            "run_dir": str(tmp_path / "run"),
        }
        for section, values in changes.items():
            recipe[section] = recipe.get(section, {}) | values if isinstance(values, dict) else values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.fixture
def read_scalars() -> Callable[[Path], dict[str, dict[int, float]]]:
    """Everything a run logged to TensorBoard: tag → step → value."""

    def read(run_dir: Path) -> dict[str, dict[int, float]]:
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    return read


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs ``gpt2 ARGS``, which must fail with ``code`` and a message that holds all ``parts``, without a traceback."""

    def run(args: list[Any], *parts: str, code: int = 1) -> None:
        capsys.readouterr()
        assert main([str(a) for a in args]) == code
        err = capsys.readouterr().err
        message = err[err.rindex("error: ") :]  # after a bar, or the usage
        assert "Traceback" not in err
        assert code == 2 or len(message.splitlines()) == 1, err
        for part in parts:
            assert part in message

    return run
