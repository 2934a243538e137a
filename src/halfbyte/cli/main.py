"""The command line: one verb a file, each of them parse, call, print, exit code.

Human text goes to stdout, progress to stderr, `--json` replaces the text by one JSON object. Exit codes: 0 fine, 1 a
check failed, 2 usage or input, 130 interrupted. A user's mistake prints what, where and what to do next, no traceback.
"""

from __future__ import annotations

import sys

import typer

from halfbyte.cli import card, demo, evaluate, generate, lm_eval, plan, push, qat, quantize, sensitivity, verify
from halfbyte.errors import run_script

#: in the order of the help
MODULES = (plan, quantize, verify, generate, evaluate, lm_eval, card, push, qat, sensitivity, demo)

app = typer.Typer(
    name="halfbyte",
    help="Large Hugging Face models in 4-bit NF4 that stock transformers loads, and what it cost, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"halfbyte {version('halfbyte')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None: ...


for module in MODULES:
    app.command(name=module.__name__.rpartition(".")[2].replace("_", "-"))(module.command)


def main() -> None:
    """Entry point of the `halfbyte` script."""
    try:
        run_script(app)
    except KeyboardInterrupt:
        print("interrupted: nothing half-written is left under a final name; run it again to continue", file=sys.stderr)
        sys.exit(130)
    except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        print(
            f"error: {error.strerror}\n  where: {error.filename}\n  next:  check the path and its rights",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
