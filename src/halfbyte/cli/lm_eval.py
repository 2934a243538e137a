"""`halfbyte lm-eval REFERENCE CANDIDATE --tasks a,b`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json


def command(
    reference: Annotated[str, typer.Argument(help="bf16 checkpoint folder, .gguf file or hub id.")],
    candidate: Annotated[str, typer.Argument(help="Checkpoint (NF4, bf16, .gguf), or SRC@nf4, SRC@q4_0.")],
    tasks: Annotated[str, typer.Option(help="lm-eval's names, with commas between.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of samples and record.")] = Path("halfbyte-lm-eval"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    limit: Annotated[int | None, typer.Option(help="First so many documents of each task.")] = None,
    include: Annotated[str | None, typer.Option(help="Folder of task YAML files of your own; Python they name is run.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt, instead of each task's own.")] = None,
    chat: Annotated[bool, typer.Option(help="Through the chat template, if there is one.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16; auto: float32 on a CPU.")] = "auto",
    batch: Annotated[int, typer.Option(help="Documents at a time.")] = 8,
    margin: Annotated[float, typer.Option(help="Accuracy: a difference within it is a tie.")] = 0.02,
    json: JSON_OPTION = False,
) -> None:  # fmt: skip
    """Run lm-eval's tasks on both models and pair them document by document (needs the extra lm-eval)."""
    from halfbyte.cli.text.harness import render
    from halfbyte.evaluator.harness import lm_eval

    with listen():
        record = lm_eval(
            reference, candidate, tasks=tasks, out=out, device=device, limit=limit, include=include, num_fewshot=num_fewshot,
            chat=chat, dtype=dtype, batch=batch, margin=margin,
        )  # fmt: skip
    if json:
        print_json(record)
    else:
        typer.echo(render(record))
