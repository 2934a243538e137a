"""`halfbyte plan SRC`."""

from __future__ import annotations

from typing import Annotated

import typer

from halfbyte.cli.text.options import BLOCKSIZE_OPTION, BUDGET_OPTION, JSON_OPTION, SENSITIVITY_OPTION
from halfbyte.cli.text.show import listen, print_json


def command(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, config.json, .gguf file or hub id.")],
    preset: Annotated[str, typer.Option(help="decoder-only, unsloth, or a TOML file.")] = "decoder-only",
    blocksize: BLOCKSIZE_OPTION = 64,
    budget: BUDGET_OPTION = None,
    sensitivity: SENSITIVITY_OPTION = None,
    card_gb: Annotated[float, typer.Option(min=0.1, help="Memory of the GPU to fit, in GB.")] = 24,
    allow_disagreement: Annotated[
        bool, typer.Option(help="Only show loaders that disagree, or refuse with exit code 2.")
    ] = True,
    probe: Annotated[
        bool, typer.Option("--probe", help="Read a sample of the weights: do they lie on an int4 or NF4 grid?")
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor with its decision.")] = False,
    json: JSON_OPTION = False,
) -> None:
    """Decide for every tensor, count, and check the skip list in every loader; no weights are read without --probe."""
    from halfbyte.recipe.survey import plan

    with listen():
        made = plan(
            source,
            card_gb=card_gb,
            allow_disagreement=allow_disagreement,
            probe=probe,
            preset=preset,
            blocksize=blocksize,
            budget=budget,
            sensitivity=sensitivity,
        )
    if json:
        body = {"digest": made.digest, **made.summary, **made.to_dict()}
        if not tensors:
            del body["decisions"]
        print_json(body)
        return
    from halfbyte.cli.text.plan import render

    typer.echo(render(made.to_dict(), with_tensors=tensors))
