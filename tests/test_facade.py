"""Python API and command line are one thing: same names, same defaults."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict
from importlib import import_module

import pytest

import halfbyte
from halfbyte.cli import generate as generate_command
from halfbyte.cli.main import app
from halfbyte.evaluator.harness import HARNESS_OPTIONS, HarnessSettings
from halfbyte.evaluator.job import EVALUATION_OPTIONS, Settings
from halfbyte.evaluator.sensitivity import SENSITIVITY_OPTIONS, Probing
from halfbyte.layers.fitting.method import METHOD_OPTIONS, Method
from halfbyte.recipe.decisions import PLAN_OPTIONS, PlanOptions
from halfbyte.runtime.generate import GENERATION_OPTIONS, generation_settings
from halfbyte.trainer.qat import TRAINING_OPTIONS, Training

#: how a command shows its result, which a function does not need
DISPLAY = {"json", "tensors"}
#: what cannot be typed on a command line: a callback, keyword options, a Plan in hand
OBJECTS = {"stream", "options", "plan", "training"}


def test_every_public_name_resolves_and_is_listed() -> None:
    assert dir(halfbyte) == sorted(halfbyte.__all__)
    assert all(getattr(halfbyte, name).__name__ == name for name in halfbyte.__all__)


def test_what_a_type_checker_sees_is_what_is_resolved() -> None:
    """Three lists name the public names: imports under TYPE_CHECKING, where each is looked up, and `__all__`."""
    tree = ast.parse(inspect.getsource(halfbyte))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    imported = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == halfbyte._HOME
    assert sorted(imported) == sorted(halfbyte.__all__)


#: a verb whose result cannot be printed
NO_COMMAND = {"load"}


def test_every_verb_is_a_command_and_the_demo_is_the_only_other() -> None:
    verbs = {name for name in halfbyte.__all__ if inspect.isfunction(getattr(halfbyte, name))}
    assert {str(command.name).replace("-", "_") for command in app.registered_commands} == verbs - NO_COMMAND | {"demo"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        halfbyte.quantise  # noqa: B018


@pytest.mark.parametrize(
    "name", ["plan", "quantize", "verify", "generate", "evaluate", "lm_eval", "card", "push", "qat", "sensitivity"]
)
def test_options_of_the_command_are_the_parameters_of_the_function(name: str) -> None:
    command = inspect.signature(import_module(f"halfbyte.cli.{name}").command).parameters
    function = inspect.signature(getattr(halfbyte, name)).parameters
    options = {n: p.default for n, p in command.items() if n not in DISPLAY}
    parameters = {n: p.default for n, p in function.items() if n not in OBJECTS}
    if name == "qat":
        defaults = asdict(Training())
        assert {n: options.pop(n) for n in TRAINING_OPTIONS} == defaults
    if name == "evaluate":
        options = {
            n: default or () if n in ("candidates", "base", "data", "protocol", "task") else default
            for n, default in options.items()
        }
        assert {n: options.pop(n) for n in EVALUATION_OPTIONS} == asdict(Settings())
    if name == "quantize":
        options["fit"] = options["fit"] or ()
        assert {n: options.pop(n) for n in METHOD_OPTIONS} == asdict(Method())
    if name == "sensitivity":
        options |= {n: options[n] or () for n in ("data", "fit")}
        assert {n: options.pop(n) for n in SENSITIVITY_OPTIONS} == asdict(Probing())
    if name in ("plan", "quantize"):
        assert {n: options.pop(n) for n in PLAN_OPTIONS} == asdict(PlanOptions())
    if name == "lm_eval":
        assert {n: options.pop(n) for n in HARNESS_OPTIONS} == asdict(HarnessSettings())
    if name == "generate":
        assert set(options) - set(parameters) == set(GENERATION_OPTIONS)
        options = {n: default or () if n == "image" else default for n, default in options.items() if n in parameters}
    assert options == parameters


def test_without_options_python_writes_as_many_tokens_as_the_command() -> None:
    default = inspect.signature(generate_command.command).parameters["max_new_tokens"].default
    assert generation_settings({})["max_new_tokens"] == default
