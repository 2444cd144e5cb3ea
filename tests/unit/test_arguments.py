"""Parsers that are built from typed functions."""

from pathlib import Path

import pytest

from gpt2_lightning.cli.arguments import call

CALLS: list[dict] = []


def example(path: Path, names: list[str] | None = None, size: int = 3, json: bool = False) -> None:
    """Do something.

    Args:
        path: where
        names: which of them
        size: how much
        json: as JSON
    """
    CALLS.append({"path": path, "names": names, "size": size, "json": json})


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a"], {"path": Path("a"), "names": None, "size": 3, "json": False}),
        (["a", "--size", "4", "--json"], {"path": Path("a"), "names": None, "size": 4, "json": True}),
        (["a", "--names", "b", "c"], {"path": Path("a"), "names": ["b", "c"], "size": 3, "json": False}),
    ],
)
def test_a_function_gets_what_was_typed_in_the_types_of_its_signature(args, expected):
    CALLS.clear()
    call(example, args)
    assert [expected] == CALLS


@pytest.mark.parametrize("args", [[], ["a", "--size", "x"], ["a", "--colour", "red"]])
def test_wrong_usage_ends_with_code_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        call(example, args)
    assert stop.value.code == 2
    assert "gpt2 example" in capsys.readouterr().err


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit):
        call(example, ["--help"])
    shown = capsys.readouterr().out
    for text in ("Do something.", "where", "which of them", "how much", "as JSON"):
        assert text in shown
