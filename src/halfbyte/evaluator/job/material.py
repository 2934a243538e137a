"""From data files to the rows of a protocol.

    .jsonl        chats or prompts, one a line (halfbyte.texts.reading); lines with an image: halfbyte.texts.vision
    anything else a text; WikiText's raw form is cut into its articles, any other file is one document

Without a file, a few prompts and passages of our own are used, so that a first evaluation needs nothing but a model. They are
few: 40 prompts and 12 passages give wide intervals, and the record says so with its n.

One text file is one document, and one document bounds nothing: its intervals are infinite, which is the truth. Give several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.job.settings import FRAME, GIVEN, OF_CHATS, ON_POLICY, RAW, Settings
from halfbyte.format.shards import hash_file
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights
from halfbyte.texts import protocols, reading
from halfbyte.texts.protocols import IMAGE
from halfbyte.texts.reading import Chat, Document
from halfbyte.texts.traces import write_answers
from halfbyte.texts.vision.prompts import PicturePrompt, has_other_lines, read_picture_prompts

PROMPTS, PASSAGES = "prompts.jsonl", "passages.txt"
_BUILT_IN_PROMPTS = "built-in prompts"


@dataclass(frozen=True)
class Material:
    """What is scored, before any tokenizer has seen it.

    paragraphs  of WikiText files, for ppl[raw,wikitext-80]
    pictures    questions about images: none is built in
    files       {"name", "sha256", "bytes"} of chats, of texts, of questions about images
    given_text  a text file was named (and not the built-in passages taken)
    """

    chats: Sequence[Chat]
    documents: Sequence[Document]
    paragraphs: Sequence[Document]
    chat_files: Sequence[dict[str, Any]]
    text_files: Sequence[dict[str, Any]]
    given_text: bool
    pictures: Sequence[PicturePrompt] = ()
    picture_files: Sequence[dict[str, Any]] = ()

    @property
    def chats_built_in(self) -> bool:
        """Whether no file had a chat in it."""
        return any(file["name"] == _BUILT_IN_PROMPTS for file in self.chat_files)

    def files_of(self, protocol: str) -> Sequence[dict[str, Any]]:
        if protocol == IMAGE:
            return self.picture_files
        return self.chat_files if protocol in OF_CHATS else self.text_files


def gather_material(data: Sequence[str | Path], limit: int | None) -> Material:
    """Chats and documents of all files, what is missing from the built-in ones; raises SourceError, UsageError."""
    paths = [Path(path) for path in data]
    lined = [path for path in paths if path.suffix.lower() == ".jsonl"]
    text_paths = [path for path in paths if path not in lined]
    shown = [(path, read) for path in lined if (read := read_picture_prompts(path))]
    chat_paths = [path for path in lined if has_other_lines(path)]
    chats = _named([(path, reading.read_chats(path)) for path in chat_paths])
    documents = _named([(path, reading.read_documents(path)) for path in text_paths])
    paragraphs = [p for path in text_paths for p in reading.read_paragraphs(path)]
    chat_files, text_files = [_about(path) for path in chat_paths], [_about(path) for path in text_paths]
    room = resources.files("halfbyte.evaluator.job") / "built_in"
    if not chats:
        with resources.as_file(room / PROMPTS) as path:
            chats, chat_files = reading.read_chats(path), [_about(path, _BUILT_IN_PROMPTS)]
    if not documents:
        with resources.as_file(room / PASSAGES) as path:
            documents, text_files = _passages(path), [_about(path, "built-in passages")]
    return Material(
        chats[:limit], documents[:limit], paragraphs, chat_files, text_files, bool(text_paths),
        _named(shown)[:limit], [_about(path) for path, _ in shown],
    )  # fmt: skip


def rows_of(
    protocol: str, reference: Weights, material: Material, settings: Settings, place: tuple[Path, str, str]
) -> Rows:
    """The rows of `protocol` in the tokenizer of `reference`; the answers of kld[assistant,on-policy] are written here.

    place  folder of the traces, device, dtype
    """
    cache, device, dtype = place
    if protocol == IMAGE:
        return _picture_rows(reference, material, settings, place)
    tokenizer = protocols.load_tokenizer(reference)
    if protocol == ON_POLICY:
        if not protocols.is_instruct(tokenizer):
            protocols.on_policy_answers(tokenizer, [], [], facts={})  # raises, in its own words
        answers, facts = write_answers(
            reference, material.chats, cache,
            max_new_tokens=settings.max_new_tokens, device=device, dtype=dtype, batch=settings.batch,
        )  # fmt: skip
        return protocols.on_policy_answers(tokenizer, material.chats, answers, facts=facts)
    if protocol == GIVEN:
        if not any(chat.response for chat in material.chats):
            raise UsageError("no chat has an answer", where=protocol, todo='give --data with "response" in its lines')
        return protocols.given_answers(tokenizer, [chat for chat in material.chats if chat.response])
    if protocol == FRAME:
        return protocols.assistant_frame(
            tokenizer, material.documents, window=settings.window, windows=settings.windows
        )
    if protocol == RAW:
        return protocols.raw_text(tokenizer, material.documents, window=settings.window, windows=settings.windows)
    return protocols.wikitext_80(tokenizer, material.paragraphs)


def check_pictures(reference: Weights, chosen: Sequence[str], material: Material) -> None:
    """Before a weight is read: raises UsageError if pictures are asked for and none is given, or the model takes none."""
    from halfbyte.texts.vision.rows import load_processor

    if IMAGE not in chosen:
        return
    if not material.pictures:
        raise UsageError("no picture was given", where=IMAGE, todo='give --data with "image" in its lines')
    load_processor(reference)


def _picture_rows(reference: Weights, material: Material, settings: Settings, place: tuple[Path, str, str]) -> Rows:
    from halfbyte.texts.vision.answers import write_picture_answers
    from halfbyte.texts.vision.rows import load_processor, look, picture_rows

    cache, device, dtype = place
    processor = load_processor(reference)
    seen = look(processor, material.pictures)
    answers, facts = write_picture_answers(
        reference, processor, seen, cache, max_new_tokens=settings.max_new_tokens, device=device, dtype=dtype
    )
    return picture_rows(processor, seen, answers, facts)


def _named(read: Sequence[tuple[Path, Sequence[Any]]]) -> list[Any]:
    """Everything in one list; with several files, names say from which (two documents of one name would be taken as one)."""
    if len(read) == 1:
        return list(read[0][1])
    return [replace(item, name=f"{path.name}: {item.name}") for path, items in read for item in items]


def _passages(path: Path) -> list[Document]:
    """Passages between blank lines, one document each."""
    pieces = [" ".join(piece.split()) for piece in path.read_text(encoding="utf-8").split("\n\n") if piece.strip()]
    return [Document(f"passage {n}", p, len(p.split()), len(p.encode())) for n, p in enumerate(pieces, start=1)]


def _about(path: Path, name: str | None = None) -> dict[str, Any]:
    return {"name": name or path.name, "sha256": hash_file(path), "bytes": path.stat().st_size}
