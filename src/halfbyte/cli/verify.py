"""`halfbyte verify OUT [--source SRC]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json
from halfbyte.errors import CheckFailed

_MARKS = {"passed": "ok    ", "failed": "FAILED", "skipped": "skip  "}


def command(
    out: Annotated[Path, typer.Argument(help="Folder of the NF4 checkpoint.")],
    source: Annotated[
        str | None, typer.Option(help="What it was made from; without it, hashes of the record are used.")
    ] = None,
    generate: Annotated[
        bool, typer.Option(help="Load through stock transformers and answer the sanity prompts.")
    ] = True,
    device: Annotated[str, typer.Option(help="Where the stock model runs: cpu or cuda[:N].")] = "cpu",
    json: JSON_OPTION = False,
) -> None:
    """Prove the checkpoint tensor by tensor, then load it in stock transformers. Exit code 1 if a check fails."""
    from halfbyte.verifier import sentences, verify

    with listen():
        record = verify(out, source=source, generate=generate, device=device)
    failures = sentences(record)
    if json:
        print_json(record)
    else:
        for check in record["checks"]:
            typer.echo(f"{_MARKS[check['status']]} {check['title']}: {check['detail']}")
        typer.echo("FAILED" if failures else "verified")
    if failures:
        raise CheckFailed("\n".join(failures), where=str(out))
