"""`halfbyte generate OUT --prompt ... [--image FILE ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.generated import figures
from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import print_json


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint that transformers can load.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[str] | None, typer.Option(help="Image file to show first; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    fast: Annotated[
        bool | None,
        typer.Option(
            help="halfbyte's linears and decode loop: everywhere, or nowhere (stock). Unless given: where measured faster."
        ),
    ] = None,
    speculate: Annotated[int, typer.Option(min=0, max=15, help="Tokens to guess ahead; the text is the same.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 256,
    do_sample: Annotated[bool | None, typer.Option(help="Sample instead of greedy decoding.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sampling temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Least probability relative to the best.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.1, help="Above 1 discourages repetition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    json: JSON_OPTION = False,
) -> None:
    """Answer one prompt, streaming tokens: on a GPU by halfbyte's own loop, else by transformers."""
    from halfbyte.runtime.generate import generate

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    result = generate(
        checkpoint,
        prompt,
        image=image or (),
        device=device,
        fast=fast,
        speculate=speculate,
        stream=None if json else show,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if json:
        print_json(result)
        return
    typer.echo("")
    for line in figures(result):
        typer.echo(line, err=True)
