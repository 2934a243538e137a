"""Options that every verb shares."""

from __future__ import annotations

from typing import Annotated

import typer

JSON_OPTION = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
