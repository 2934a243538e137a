"""Text that a candidate was calibrated on says nothing about it: it is refused before anything is scored.

A checkpoint of `halfbyte quantize --method scale|gptq --calibration ...` keeps the hashes of what it was fitted to, paragraph by
paragraph (halfbyte.texts.calibration). They are compared with the chats, texts, pictures and task items that are to be measured on (pictures by their pixels).

The catch: only exact text is found, up to case and spaces; a translation or a paraphrase is not. A checkpoint made elsewhere says
nothing of its calibration, and rows of a reference pack are known by their prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.job.bases import Base, Entry
from halfbyte.evaluator.job.material import Material
from halfbyte.evaluator.job.writing import own_checkpoint
from halfbyte.evaluator.packed import PackedReference
from halfbyte.evaluator.tasks.task import Item, Task
from halfbyte.images import open_image, picture_hash
from halfbyte.records import read_record
from halfbyte.texts.calibration import chat_hashes, prompt_hashes, shared_documents, text_hashes

_NAMED = 3


def method_of(entry: Entry) -> dict[str, Any] | None:
    """The `method` of the candidate's own quantize record, hashes and all; None if it has none (or was rounded to nearest)."""
    found = own_checkpoint(entry)
    record = read_record(found[0], "quantize") if found is not None else None
    return (record or {}).get("method")


def method_facts(entry: Entry) -> dict[str, Any] | None:
    """The same for a record of an evaluation: what a report says of it, without the hashes."""
    method = method_of(entry)
    if method is None:
        return None
    calibration = method["calibration"] and {
        key: value for key, value in method["calibration"].items() if key != "hashes"
    }
    return {"name": method["name"], "calibration": calibration, "gain": method["gain"]}


def refuse_seen(bases: Sequence[Base], material: Material, tasks: Sequence[Task]) -> None:
    """Raises UsageError if a candidate was calibrated on what is to be measured on, naming the documents.

    raises SourceError too if a candidate's weights are not those that its own record names
    """
    for base in bases:
        hashes = [((method_of(entry) or {}).get("calibration") or {}).get("hashes", ()) for entry in base.candidates]
        measured = list(_measured(base, material, tasks)) if any(hashes) else []
        for entry, known in zip(base.candidates, hashes, strict=True):
            there = shared_documents(measured, known) if known else []
            if there:
                more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
                raise UsageError(
                    f"was calibrated on {len(there)} of the documents to be measured on: {', '.join(there[:_NAMED])}{more}",
                    where=entry.id, todo="leave them out, or calibrate on other text",
                )  # fmt: skip


def _measured(base: Base, material: Material, tasks: Sequence[Task]) -> Iterator[tuple[str, set[str]]]:
    if isinstance(base.reference, PackedReference):
        rows = base.reference.kept.rows
        yield from ((name, prompt_hashes(text)) for name, text in zip(rows.documents, rows.texts or (), strict=False))
    else:
        yield from ((chat.name, chat_hashes(chat)) for chat in material.chats)
        yield from ((document.name, text_hashes(document.text)) for document in material.documents)
        yield from ((one.name, {picture_hash(open_image(one.image))}) for one in material.pictures)
    yield from ((f"{task.name} {item.id}", _shown(task, item)) for task in tasks for item in task.items)


def _shown(task: Task, item: Item) -> set[str]:
    """An item's hashes.

    Where text is laid before the model, of the whole of it, and of what it was cut from. Of a question about a picture the picture:
    "What is this?" may be asked of any.
    """
    if task.forced:
        return text_hashes(item.prompt + item.key) | (text_hashes(item.source) if item.source else set())
    return prompt_hashes(item.prompt) if item.image is None else {picture_hash(open_image(item.image))}
