"""A wrong command line ends with its exit code and a message that names the mistake, and changes no file.

The rows are in wrong_invocations.yaml. For usage errors (exit code 2) the parser chooses the words.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_folder import arguments, files
from lightning.pytorch.utilities import rank_zero_only

from gpt2_lightning.__main__ import main

TABLE = yaml.safe_load((Path(__file__).parent / "wrong_invocations.yaml").read_text())


def _rows() -> Iterator[Any]:
    for section, code in (("usage", 2), ("mistakes", 1)):
        for line, words in TABLE[section].items():
            environment, command = re.fullmatch(r"((?:[A-Z_]+=\S+ )*)(.*)", line).groups()
            yield pytest.param(command, code, words, dict(v.split("=") for v in environment.split()), id=line)


@pytest.mark.usefixtures("shared_folder")
@pytest.mark.parametrize(("line", "code", "words", "environment"), list(_rows()))
def test_a_wrong_invocation_names_the_mistake_and_changes_no_file(line, code, words, environment, capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning keeps what NODE_RANK was
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args, before = arguments(line), files()
    assert main(args) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    message = err.partition("error: ")[2].lower()
    if code == 1:
        assert err.splitlines()[-1].startswith(f"gpt2 {args[0]}: error: ")
        assert err.count(f"gpt2 {args[0]}: error: ") == 1
    for word in words:
        assert word.lower() in message
    if "--json" in args:
        assert out == ""
    after = files()
    assert {path: after.get(path) for path in before} == before
    if args[0] not in ("fit", "prepare"):  # these have made their new folder by then
        assert after == before
