"""`halfbyte quantize SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import BLOCKSIZE_OPTION, BUDGET_OPTION, JSON_OPTION, SENSITIVITY_OPTION
from halfbyte.cli.text.show import listen, print_json


def command(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, .gguf file or hub id (org/name[@revision]).")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an interrupted job there is continued.")],
    preset: Annotated[str, typer.Option(help="decoder-only, unsloth, or a TOML file.")] = "decoder-only",
    blocksize: BLOCKSIZE_OPTION = 64,
    budget: BUDGET_OPTION = None,
    sensitivity: SENSITIVITY_OPTION = None,
    device: Annotated[str, typer.Option(help="Where the codec runs: cpu or cuda[:N]. The bytes of rtn are the same.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Largest shard, e.g. 5GB, 500MB, 4GiB.")] = "5GB",
    allow_disagreement: Annotated[
        bool, typer.Option("--allow-disagreement", help="Write a skip list that loaders read differently.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what halfbyte wrote in OUT before.")] = False,
    method: Annotated[str, typer.Option(help="rtn (round to nearest, as bitsandbytes), scale or gptq.")] = "rtn",
    calibration: Annotated[
        str | None, typer.Option(help="builtin, or a file of chats or texts that tells which weights matter; gptq needs one: builtin.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="At most so many tokens of it.")] = 65_536,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that the source writes to a prompt of it.")] = 256,
    dtype: Annotated[str, typer.Option(help="Of calibration: float32, bfloat16; auto: float32 on a CPU.")] = "auto",
    batch: Annotated[int, typer.Option(help="Rows of calibration at a time.")] = 8,
    fit: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of a fit: signed, weighted, candidates, refit, damping, order, sweeps; may be repeated.")
    ] = None,
    sequential: Annotated[
        bool, typer.Option(help="Measure a linear's inputs behind the quantized ones of its own layer too.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Which calibration texts are drawn.")] = 0,
    json: JSON_OPTION = False,
) -> None:  # fmt: skip
    """Write the NF4 checkpoint: streamed, resumable, byte-identical however often it was interrupted."""
    options = {name: value for name, value in locals().items() if name != "json"} | {"fit": fit or ()}
    from halfbyte.cli.text.quantized import render
    from halfbyte.quantizer.job import quantize

    with listen():
        record = quantize(**options)
    if json:
        print_json(record)
        return
    typer.echo(render(record, source, out))
