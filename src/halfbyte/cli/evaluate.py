"""`halfbyte evaluate REFERENCE CANDIDATE...`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json
from halfbyte.errors import CheckFailed


def command(
    reference: Annotated[str, typer.Argument(help="bf16 checkpoint folder, .gguf file, hub id, or a reference pack.")],
    candidates: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints (NF4, bf16, .gguf), or SRC@nf4, SRC@q4_0, SRC@uniform; NAME: in front of a --base's."),
    ] = None,
    base: Annotated[list[str] | None, typer.Option(help="NAME=REF: a further reference; may be repeated.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help=".jsonl of prompts, chats or questions with an image, or a text; may be repeated. Without: built-in prompts.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of record, vectors and report.")] = Path("halfbyte-evaluation"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    protocol: Annotated[
        list[str] | None, typer.Option(help="e.g. 'kld[assistant,given]', or none; may be repeated. Without: what means something.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First so many chats, documents, pictures.")] = None,
    window: Annotated[int, typer.Option(help="Text tokens a row.")] = 512,
    windows: Annotated[int | None, typer.Option(help="First so many rows of a document.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that the reference writes.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16; auto: float32 on a CPU.")] = "auto",
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    margin: Annotated[float, typer.Option(help="Nats: a loss within it is a tie.")] = 0.01,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap over documents.")] = 10_000,
    floor: Annotated[bool, typer.Option(help="Measure the noise floor.")] = True,
    layers: Annotated[bool, typer.Option(help="Measure the error of every weight tensor, and of the residual stream after every layer.")] = True,
    write_reference: Annotated[Path | None, typer.Option(help="Also write the reference as a pack, to score against without it.")] = None,
    pack_head: Annotated[bool, typer.Option(help="Put the output embedding into that pack too.")] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: gsm8k, ifeval, mbpp, questions or lastword; may be repeated.")
    ] = None,
    allow_code: Annotated[bool, typer.Option(help="Run the code that models write for mbpp, in a sandbox.")] = False,
    task_limit: Annotated[int | None, typer.Option(help="First so many items of each task.")] = None,
    task_margin: Annotated[float, typer.Option(help="Accuracy: a difference within it is a tie.")] = 0.02,
    task_max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer to a task, instead of each task's own.")] = None,
    json: JSON_OPTION = False,
) -> None:  # fmt: skip
    """Measure what a candidate lost against its full precision: record, vectors, HTML report."""
    from halfbyte.cards.report import report
    from halfbyte.cli.text.evaluation import render
    from halfbyte.evaluator.job import evaluate

    with listen():
        record = evaluate(
            reference, candidates or (), base=base or (), data=data or (), out=out, device=device, protocol=protocol or (),
            limit=limit, window=window, windows=windows, max_new_tokens=max_new_tokens, dtype=dtype, batch=batch, margin=margin,
            resamples=resamples, floor=floor, layers=layers, write_reference=write_reference, pack_head=pack_head,
            task=task or (), allow_code=allow_code, task_limit=task_limit, task_margin=task_margin,
            task_max_new_tokens=task_max_new_tokens,
        )  # fmt: skip
    page = report(out)
    if json:
        print_json(record)
    else:
        typer.echo(render(record))
        typer.echo(f"report: {page}")
    _refuse_noise(record, out)


def _refuse_noise(record: Mapping[str, Any], out: Path) -> None:
    """Raises CheckFailed if a reference diverged from itself."""
    failed = [test for test in record["self_tests"] if not test["passed"]]
    if failed:
        found = "; ".join(f"{test['base']}, {test['protocol']}: {test['value']:g}" for test in failed)
        raise CheckFailed(
            f"the reference's KLD against itself is not 0 ({found}): the kernels are not deterministic",
            where=str(out),
            todo="do not use these figures; try --device cpu",
        )
