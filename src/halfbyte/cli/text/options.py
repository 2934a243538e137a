"""Options that every verb shares."""

from __future__ import annotations

from typing import Annotated

import typer

JSON_OPTION = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
BLOCKSIZE_OPTION = Annotated[
    int, typer.Option(help="Weights a scale: 64, or 32 (0.125 bits a weight more; needs bitsandbytes >= 0.49.2).")
]
BUDGET_OPTION = Annotated[
    str | None,
    typer.Option(help="Choose NF4-64, NF4-32 or no quantization module by module: 20GiB, 18.5GB or 4.5bpw of tensors."),
]
SENSITIVITY_OPTION = Annotated[
    str | None,
    typer.Option(help="What --budget decides by: the folder that halfbyte sensitivity wrote, or its record."),
]
