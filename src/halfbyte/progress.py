"""Progress of long work, as a seam: workers say how far they are, whoever started them decides how it looks.

A worker writes `with track("quantize", total) as advance: ... advance(n)`. Without a listener that costs nothing; the
command line installs one that draws bars on stderr. A context variable carries it, so no signature has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

Advance = Callable[[int], None]


class Listener(Protocol):
    """Draws progress. `unit` is `B` for bytes, else a noun such as `tensors`."""

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...

    def note(self, text: str) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("halfbyte_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Everything inside reports to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def track(title: str, total: int, unit: str = "B") -> Iterator[Advance]:
    """A piece of work of known size; call the yielded function with each amount done (from any thread)."""
    listener = _listener.get()
    if listener is None:
        yield lambda amount: None
        return
    with listener.task(title, total, unit) as advance:
        yield advance


def note(text: str) -> None:
    """One line a person should see while work goes on (what is resumed, what is skipped)."""
    listener = _listener.get()
    if listener is not None:
        listener.note(text)
