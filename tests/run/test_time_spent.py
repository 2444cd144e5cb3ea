"""The line at a run's end that says what its time went into."""

import re
import time

import pytest

from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.time_spent import duration, time_line
from gpt2_lightning.callbacks.validation import ValidationLoss


def test_the_line():
    parts = {"validation": 85.8, "HellaSwag": 70.2, "samples": 0.0}
    assert time_line(7800.0, parts) == "time: 2 h 10 min, of which validation 1.1 %, HellaSwag 0.9 %, samples 0.0 %"
    assert time_line(5.0, {}) == "time: 5.0 s"
    assert time_line(5.0, {}, 400) == "time since step 400, where this start went on: 5.0 s"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.24, "4.2 s"), (59.97, "1 min 0 s"), (185, "3 min 5 s"), (3599.7, "1 h 0 min"), (7800, "2 h 10 min")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_a_run_tells_its_own_time_and_a_resumed_one_that_of_its_start(make_shards, write_recipe, capsys, monkeypatch):
    run = ValidationLoss.run

    def slow(self, trainer, module, step):
        time.sleep(0.5)
        run(self, trainer, module, step)

    recipe = write_recipe(make_shards(), validation={"every_n_steps": 3}, checkpoint={"every_n_steps": 3})
    monkeypatch.setattr(ValidationLoss, "run", slow)
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
    seconds, shares = _told(capsys.readouterr().out, "time: ")
    assert list(shares) == ["validation", "checkpoints"]  # HellaSwag and samples are off
    assert seconds * shares["validation"] / 100 >= 1.0 - 0.05  # after steps 0 and 3; the figures are rounded
    assert sum(shares.values()) < 100

    monkeypatch.setattr(ValidationLoss, "run", run)  # what the first start waited for is not counted again
    assert main(["fit", "--config", str(recipe)]) == 0
    seconds, shares = _told(capsys.readouterr().out, "time since step 3, where this start went on: ")
    assert seconds * shares["validation"] / 100 < 0.9

    assert main(["fit", "--config", str(recipe)]) == 0  # finished: no time was spent
    assert "\ntime" not in capsys.readouterr().out


def _told(output: str, beginning: str) -> tuple[float, dict[str, float]]:
    (line,) = [line for line in output.splitlines() if line.startswith(beginning)]
    whole, _, parts = line.removeprefix(beginning).partition(", of which ")
    return float(whole.removesuffix(" s")), {
        name: float(share) for name, share in re.findall(r"(\w+) ([\d.]+) %", parts)
    }
