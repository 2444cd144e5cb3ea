"""The line at the end of a run that says what its time went into."""

import re
import time

import pytest

from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.metrics import time_line
from gpt2_lightning.callbacks.validation import ValidationLoss


@pytest.mark.parametrize(
    ("seconds", "parts", "first_step", "line"),
    [
        (7800.4, {"validation": 85.8, "samples": 0.0}, 0, "time: 2:10:00, of which validation 1.1%, samples 0.0%"),
        (109.4, {}, 0, "time: 0:01:49"),
        (5.0, {}, 400, "time since step 400: 0:00:05"),
    ],
)
def test_the_time_line(seconds, parts, first_step, line):
    assert time_line(seconds, parts, first_step) == line


def test_a_run_reports_the_time_of_this_start_only(make_shards, write_recipe, capsys, monkeypatch):
    recipe = write_recipe(make_shards(), validation={"every_n_steps": 3}, checkpoint={"every_n_steps": 3})
    args = ["fit", "--config", str(recipe)]
    run = ValidationLoss.run

    def slow(self, trainer, module, step):
        time.sleep(1.5)
        run(self, trainer, module, step)

    def shares(label):
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(label)]
        return {name: float(share) for name, share in re.findall(r"(\w+) ([\d.]+)%", line)}

    with monkeypatch.context() as patch:
        patch.setattr(ValidationLoss, "run", slow)
        assert main([*args, "--trainer.max_steps", "3"]) == 0
    found = shares("time: 0:00:0")
    assert list(found) == ["validation", "checkpoints"]  # HellaSwag and samples are off
    assert found["validation"] > 60  # 3 s of sleep at steps 0 and 3; the six steps take a fraction of a second
    assert sum(found.values()) < 100

    assert main(args) == 0
    assert shares("time since step 3: 0:00:0")["validation"] < 60
    assert main(args) == 0  # complete already: no time was spent
    assert "\ntime" not in capsys.readouterr().out
