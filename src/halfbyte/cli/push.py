"""`halfbyte push OUT REPO`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.text.options import JSON_OPTION
from halfbyte.cli.text.show import listen, print_json


def command(
    out: Annotated[Path, typer.Argument(help="Folder of the verified checkpoint, card included.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, org/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, upload nothing.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    json: JSON_OPTION = False,
) -> None:
    """Upload the checkpoint with huggingface_hub; refuses one that was not verified."""
    from halfbyte.cards import push

    with listen():
        result = push(out, repo, private=private, dry_run=dry_run, message=message)
    if json:
        print_json(result)
        return
    for entry in result["files"]:
        typer.echo(f"{entry['bytes']:>15,}  {entry['name']}")
    typer.echo(f"{result['bytes']:>15,}  {'would go' if dry_run else 'sent'} to {repo}")
