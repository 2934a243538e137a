"""Python API and command line are one thing: same names, same defaults."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

import halfbyte
from halfbyte.runtime.generate import GENERATION_OPTIONS

#: how a command shows its result, which a function does not need
DISPLAY = {"json", "tensors"}
#: what cannot be typed on a command line: a callback, keyword options, a Plan in hand
OBJECTS = {"stream", "options", "plan"}


def test_every_public_name_resolves_and_is_listed() -> None:
    assert dir(halfbyte) == sorted(halfbyte.__all__)
    assert all(getattr(halfbyte, name).__name__ == name for name in halfbyte.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        halfbyte.quantise  # noqa: B018


@pytest.mark.parametrize("name", ["plan", "quantize", "verify", "generate", "card", "push"])
def test_options_of_the_command_are_the_parameters_of_the_function(name: str) -> None:
    command = inspect.signature(import_module(f"halfbyte.cli.{name}").command).parameters
    function = inspect.signature(getattr(halfbyte, name)).parameters
    options = {n: p.default for n, p in command.items() if n not in DISPLAY}
    parameters = {n: p.default for n, p in function.items() if n not in OBJECTS}
    if name == "generate":
        assert set(options) - set(parameters) == set(GENERATION_OPTIONS)
        options = {n: default or () if n == "image" else default for n, default in options.items() if n in parameters}
    assert options == parameters
