"""`halfbyte qat SRC OUT --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json


def command(
    source: Annotated[str, typer.Argument(help="bf16 checkpoint folder, .gguf file or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; a stopped run continues in it.")],
    data: Annotated[Path, typer.Option(help="JSON Lines of chats or texts, or a .txt file.")],
    grid: Annotated[str, typer.Option(help="q4_0 (int4, blocks of 32) or nf4.")] = "q4_0",
    preset: Annotated[str, typer.Option(help="Which linears: decoder-only, unsloth, or a TOML file.")] = "decoder-only",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Most tokens a row.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine.")] = 3e-5,
    seed: Annotated[int, typer.Option(help="Order of the rows.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints, 0 for none.")] = 100,
    json: JSON_OPTION = False,
) -> None:
    """Train a model onto a 4-bit grid by distillation from itself; writes plain bf16 that lies on it."""
    from halfbyte.trainer.qat import qat

    with listen():
        record = qat(
            source,
            out,
            data=data,
            grid=grid,
            preset=preset,
            device=device,
            steps=steps,
            batch=batch,
            length=length,
            learning_rate=learning_rate,
            seed=seed,
            save_every=save_every,
        )
    if json:
        print_json(record)
        return
    first, last = record["loss"]["first"], record["loss"]["last"]
    typer.echo(
        f"{out}: {record['modules']} linears on {grid} in {record['run']['seconds']:.0f} s; "
        f"divergence from the source {first:.4f} -> {last:.4f} nats a token (training rows)"
    )
