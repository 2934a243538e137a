"""The options of an evaluation, and which protocols mean something for a model.

Margins are stated before anything is measured. The default is 0.01 nats: one percent of perplexity when it bounds a
difference of NLL; a quarter of the 0.042 nats that a 31B was published to lose as Q4_0 when it bounds a mean KLD. Tasks have a margin of
their own, 0.02 of accuracy (halfbyte.evaluator.tasks.results says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.tasks.opening import NAMES as TASKS
from halfbyte.layers.model import DTYPES
from halfbyte.texts.protocols import IMAGE, VERSIONS

ON_POLICY, GIVEN, FRAME, RAW, WIKITEXT, _ = VERSIONS
#: protocols over answers, in chats or about pictures; the others are over texts
OF_CHATS = (ON_POLICY, GIVEN, IMAGE)
#: as the only protocol: none is scored, tasks are all there is
NONE = "none"


@dataclass(frozen=True)
class Settings:
    """By the names of the command line.

    protocol        names of halfbyte.texts.protocols; empty: those that mean something for the model; `none`: only tasks
    limit           the first so many chats, documents and pictures; None: all
    window          text tokens a row (ppl protocols; ppl[raw,wikitext-80] has its own, 1024)
    windows         the first so many rows of a document (ppl[assistant-frame], ppl[raw]); None: all. Documents bound a figure,
                    not tokens: where time is short, one window of forty texts says more than forty of one
    max_new_tokens  longest answer that the reference writes
    dtype           `float32`, `bfloat16`, or `auto`: float32 on the CPU, bfloat16 on a GPU
    batch           rows at a time
    margin          nats: a mean KLD, or a difference of NLL, whose interval lies within it is a tie
    resamples       of the bootstrap over documents
    floor           also measure the noise floor
    layers          also measure the error of every weight tensor, and of the residual stream after every layer
    write_reference a file for a reference pack (halfbyte.evaluator.packed): the reference under the one protocol that is run
    pack_head       put the output embedding into that pack too: for candidates whose own differs
    task            "NAME=FILE" each (halfbyte.evaluator.tasks.opening): gsm8k, ifeval, mbpp, questions, lastword
    allow_code      code that models write for mbpp may be run, in a sandbox (halfbyte.evaluator.tasks.sandbox)
    task_limit      the first so many items of each task, in the file's order; None: all
    task_margin     accuracy: a paired difference whose interval lies within it is a tie
    task_max_new_tokens  longest answer of every task; None: each task's own
    """

    protocol: Sequence[str] = ()
    limit: int | None = None
    window: int = 512
    windows: int | None = None
    max_new_tokens: int = 128
    dtype: str = "auto"
    batch: int = 8
    margin: float = 0.01
    resamples: int = 10_000
    floor: bool = True
    layers: bool = True
    write_reference: str | Path | None = None
    pack_head: bool = False
    task: Sequence[str] = ()
    allow_code: bool = False
    task_limit: int | None = None
    task_margin: float = 0.02
    task_max_new_tokens: int | None = None


EVALUATION_OPTIONS = tuple(Settings.__dataclass_fields__)


def settings_of(options: dict[str, Any]) -> Settings:
    """Checked settings; raises UsageError, naming the option."""
    if unknown := options.keys() - set(EVALUATION_OPTIONS):
        raise UsageError(
            f"unknown option {min(unknown)!r}", where="evaluate", todo=f"known: {', '.join(EVALUATION_OPTIONS)}"
        )
    given = dict(options)
    for name in ("protocol", "task"):
        value = given.get(name)
        given[name] = (value,) if isinstance(value, str) else tuple(value or ())
    if given.get("write_reference") is not None:
        given["write_reference"] = str(given["write_reference"])
    made = Settings(**given)
    least = {
        "limit": 1, "window": 2, "windows": 1, "max_new_tokens": 1, "batch": 1, "resamples": 100, "task_limit": 1,
        "task_max_new_tokens": 1,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(made, name)
        if value is not None and value < bound:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{value} is too small", where=option, todo=f"give {bound} or more")
    if not 0 <= made.margin < float("inf"):
        raise UsageError(f"{made.margin} is no margin", where="--margin", todo="give nats, 0 or more")
    if not 0 <= made.task_margin <= 1:
        raise UsageError(f"{made.task_margin} is no margin", where="--task-margin", todo="give a share, 0 to 1")
    if made.dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {made.dtype!r}", where="--dtype", todo=f"auto, {', '.join(DTYPES)}")
    if made.pack_head and made.write_reference is None:
        raise UsageError("no pack is written", where="--pack-head", todo="give --write-reference FILE too")
    _check_protocols(made)
    return made


def _check_protocols(made: Settings) -> None:
    for name in made.protocol:
        if name not in (*VERSIONS, NONE):
            known = ", ".join((*VERSIONS, NONE))
            raise UsageError(f"unknown protocol {name!r}", where="--protocol", todo=f"known: {known}")
    if NONE in made.protocol and len(set(made.protocol)) > 1:
        raise UsageError("none and another protocol", where="--protocol", todo="name either")
    if NONE in made.protocol and not made.task:
        raise UsageError(
            "nothing to measure", where="--protocol none", todo=f"add --task NAME=FILE: {', '.join(TASKS)}"
        )


def check_pack_options(settings: Settings, data: Sequence[str | Path]) -> None:
    """A pack brings its own rows: raises UsageError for an option that would have had to make others."""
    asked = ["data"] if data else []
    asked += [
        name
        for name in ("limit", "window", "windows", "max_new_tokens")
        if getattr(settings, name) != getattr(Settings, name)
    ]
    if asked:
        option = f"--{asked[0].replace('_', '-')}"
        raise UsageError("a reference pack brings its own rows", where=option, todo="leave the option out")


def choose_protocols(
    requested: Sequence[str], *, instruct: bool, has_text: bool, has_pictures: bool = False
) -> tuple[str, ...]:
    """What was asked for, or what means something: KLD on own answers for a model with turns (and the text inside its
    own turn, if a text was given; and answers about pictures, if some were), raw perplexity for one without.
    """
    if requested:
        return tuple(dict.fromkeys(name for name in requested if name != NONE))
    found = [*((ON_POLICY, FRAME) if has_text else (ON_POLICY,))] if instruct else [RAW]
    return (*found, IMAGE) if has_pictures else tuple(found)


def command_of(positional: Sequence[str], options: dict[str, Sequence[str]], settings: Settings) -> list[str]:
    """The command line that makes the same record again: what differs from the defaults, by the names of `Settings`.

    options  of the command that are no settings: name -> values, each becomes one option
    """
    words = ["halfbyte", "evaluate", *positional]
    for name, values in options.items():
        for value in values:
            words += [f"--{name}", value]
    for name, default in asdict(Settings()).items():
        value, flag = getattr(settings, name), name.replace("_", "-")
        if value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for each in value if isinstance(value, tuple) else (value,):
                words += [f"--{flag}", str(each)]
    return words
