"""`halfbyte demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json


def command(
    out: Annotated[Path, typer.Argument(help="Folder for everything the demo writes.")] = Path("halfbyte-demo"),
    json: JSON_OPTION = False,
) -> None:
    """Run the main job on the embedded pair: plan, quantize, verify, evaluate, card."""
    from halfbyte.demo.tour import tour

    with listen():
        result = tour(out, say=(lambda text: None) if json else typer.echo)
    if json:
        print_json(result)
