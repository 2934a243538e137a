"""What can go wrong, as a tree. Every error says three things: what (the value), where (file, tensor), what to do next.

    HalfbyteError                exit 2, unless it says otherwise
    ├── UsageError               an option or argument that cannot be
    ├── SourceError              a source that cannot be used
    │   ├── HeaderError          a safetensors or GGUF header that lies, or a file cut short
    │   ├── UnsafeName           a shard or tensor name that would climb out of its folder
    │   └── NonFiniteWeight      NaN or infinity where a number must be
    ├── ShapeMismatch            two things that must have the same size do not
    ├── PlanError                a plan that cannot be carried out
    │   └── LoaderDisagreement   loaders would read the written skip list differently
    ├── OutputError              a target that is in the way, too small, or not ours
    └── CheckFailed              exit 1: the work ran, and a check says no

A user's mistake never ends in a traceback: the command line prints `str(error)` and leaves with `exit_code`.
An `assert` in this code base is for our own bugs only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class HalfbyteError(Exception):
    """Root of the tree.

    what   the value that is wrong, one sentence
    where  the file, tensor or option it was found in
    todo   what the reader can do next
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.todo = todo

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.todo:
            parts.append(f"  next:  {self.todo}")
        return "\n".join(parts)


class UsageError(HalfbyteError):
    """An option or argument that cannot be."""


class SourceError(HalfbyteError):
    """A source that cannot be used."""


class HeaderError(SourceError):
    """A safetensors or GGUF header that lies, or a file cut short."""


class UnsafeName(SourceError):
    """A shard or tensor name that would climb out of its folder."""


class NonFiniteWeight(SourceError):
    """NaN or infinity where a number must be."""


class ShapeMismatch(HalfbyteError):
    """Two things that must have the same size do not."""


class PlanError(HalfbyteError):
    """A plan that cannot be carried out."""


class LoaderDisagreement(PlanError):
    """Loaders would read the written skip list differently."""


class OutputError(HalfbyteError):
    """A target that is in the way, too small, or not ours."""


class CheckFailed(HalfbyteError):
    """The work ran, and a check says no."""

    exit_code = 1


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's `main`; a user's mistake is printed to stderr and ends the process with its exit code."""
    try:
        code = main()
    except HalfbyteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if code:
        sys.exit(code)
