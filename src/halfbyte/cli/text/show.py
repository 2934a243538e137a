"""What a person sees: progress bars on stderr, JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halfbyte.progress import Advance, listening


def print_json(body: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(body, indent=1, ensure_ascii=False))


class Bars:
    """Draws progress with rich: bytes, rate and time left. Not a terminal: one line at the end of each task."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        amounts = [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), TextColumn(unit)]
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn(), console=self.console
        )
        with bar:
            task = bar.add_task(title, total=total)
            yield lambda amount: bar.advance(task, amount)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


@contextmanager
def listen() -> Iterator[None]:
    """Progress of everything inside is drawn on stderr."""
    with listening(Bars()):
        yield
