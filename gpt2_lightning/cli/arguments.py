"""Command-line parsers from typed functions."""

import inspect
import re
from collections.abc import Callable
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser


def call(function: Callable[..., None], args: list[str]) -> None:
    """Call ``function`` with the arguments of the command that has its name.

    jsonargparse builds the parser from signature and docstring: parameters without a default are positional, types are
    checked. Two things are added to what it does: a ``bool`` is a flag without a value, and a ``list`` takes several
    values. A function of ``args: list[str]`` alone parses them itself, as those on LightningCLI do.
    """
    parameters = inspect.signature(function).parameters
    if [*parameters] == ["args"]:
        function(args)
        return
    doc = inspect.getdoc(function) or ""
    parser = ArgumentParser(prog=f"gpt2 {function.__name__}", description=doc.partition("\n")[0])
    special = {name: element for name, p in parameters.items() if (element := _flag_or_element(p.annotation))}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(special))
    for name, element in special.items():
        required = parameters[name].default is inspect.Parameter.empty
        options: dict[str, Any] = {"action": "store_true"} if element is bool else {"type": element, "nargs": "+"}
        help = re.search(rf"^ +{name}: (.*)", doc, re.MULTILINE)
        parser.add_argument(name if required else f"--{name}", help=help and help[1], **options)
    function(**vars(parser.parse_args(args)))


def _flag_or_element(annotation: Any) -> type | None:
    """``bool`` for a flag, the type of the elements for a list (also ``list | None``), else None."""
    if annotation is bool:
        return bool
    lists = [a for a in (annotation, *get_args(annotation)) if get_origin(a) is list]
    return get_args(lists[0])[0] if lists else None
