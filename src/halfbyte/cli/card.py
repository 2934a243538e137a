"""`halfbyte card OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import print_json


def command(
    out: Annotated[Path, typer.Argument(help="Folder of the NF4 checkpoint.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of the source, if it was a local folder.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence identifier, if the source does not state it.")] = None,
    json: JSON_OPTION = False,
) -> None:
    """Write README.md from the records: every figure in it was measured, what was not says so."""
    from halfbyte.cards import card

    path = card(out, base_model=base_model, license=license)
    if json:
        print_json({"card": str(path), "bytes": path.stat().st_size})
        return
    typer.echo(str(path))
