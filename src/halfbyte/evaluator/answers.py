"""Questions with one right answer: ask a model in batches, score by exact match, compare two models question by question.

Greedy decoding through the chat template, so that the only thing that differs between reference and candidate is the
weights. Prompts of a batch are padded on the left: generation continues at the right end, where every row must end in
its own prompt. Questions with and without an image never share a batch, because processors want all rows alike.

Exact match is a blunt tool, on purpose: no judge, no parsing rules that favour one model's habits. Ask so that a short
answer is natural ("Answer with one word."), and read `normalise` for what is forgiven.

Catch: batching changes the shapes of the matrix products, and with them the last bits of bf16 logits, which tie at the top
in 6 % of tokens (two neighbouring logits round to the same bf16). Of 64 answers of 16 tokens by the random tiny Gemma 4, batches
of 8 changed none in float32 and 49 in bf16 (a trained model is surer of its tokens, and changes fewer). So give reference
and candidate the same questions and the same batch size: then both see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ShapeMismatch, SourceError, UsageError
from halfbyte.evaluator.statistics.paired_tests import mcnemar, paired_difference, wilson
from halfbyte.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Question:
    """What is asked, and the one right answer.

    id      unique among the questions asked together
    kind    the group it is counted in, e.g. `counting`
    image   a file, a PIL image, or None
    answer  compared after `normalise`
    """

    id: str
    kind: str
    prompt: str
    image: Path | str | Image | None
    answer: str


@dataclass(frozen=True)
class Answer:
    """What a model said.

    text     decoded without special tokens, as generated
    correct  normalise(text) == normalise(the question's answer)
    tokens   ids of the new tokens, up to and with the stop token; no padding
    """

    id: str
    kind: str
    text: str
    correct: bool
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same n questions; intervals at 95 %.

    reference, candidate  right answers
    *_interval            Wilson's, of the accuracy
    only_reference        right before, wrong now; only_candidate the other way round
    p                     McNemar, exact, two-sided
    difference, low, high accuracy(candidate) - accuracy(reference), Tango's paired interval; higher is better
    same_text             answers that are equal to the letter
    """

    kind: str
    n: int
    reference: int
    candidate: int
    reference_interval: tuple[float, float]
    candidate_interval: tuple[float, float]
    only_reference: int
    only_candidate: int
    p: float
    difference: float
    low: float
    high: float
    same_text: int


def normalise(text: str) -> str:
    """What exact match compares: ends stripped, runs of white space one space, one final full stop dropped, case folded.

    Nothing else: "3" is not "three", "3.0" is not "3", and "It is red" is not "red".
    """
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def answer_questions(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    device: str = "cpu",
) -> list[Answer]:
    """Every question's greedy answer, in the order asked.

    model       a transformers model with `generate`, already on `device`
    processor   its processor, or its tokenizer if it takes no images; without a chat template the prompt goes in as it is
    batch_size  questions a batch; with and without image apart, those of like length together
    raises      UsageError (an image for a model that takes none, equal ids, a size below 1), SourceError (image file)
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise UsageError(f"impossible: batch_size {batch_size}, max_new_tokens {max_new_tokens}", todo="1 or more")
    if len({question.id for question in questions}) < len(questions):
        raise UsageError("two questions have the same id", where="questions", todo="give each its own")
    sees = hasattr(processor, "image_processor")
    if not sees and (blind := [question.id for question in questions if question.image is not None]):
        raise UsageError("this model takes no images", where=f"question {blind[0]}", todo="leave those questions out")
    answers: dict[str, Answer] = {}
    with track("answer", len(questions), "questions") as advance, _padding_left(processor):
        for batch in _batches(questions, batch_size):
            for question, tokens in zip(batch, _generate(model, processor, batch, max_new_tokens, device), strict=True):
                text = processor.decode(tokens, skip_special_tokens=True)
                correct = normalise(text) == normalise(question.answer)
                answers[question.id] = Answer(question.id, question.kind, text, correct, tuple(tokens))
            advance(len(batch))
    return [answers[question.id] for question in questions]


def compare_answers(reference: Sequence[Answer], candidate: Sequence[Answer]) -> dict[str, Comparison]:
    """`all` and then each kind (in the order met) -> Comparison.

    raises  ShapeMismatch unless both answer the same questions (ids and kinds; any order), UsageError if there are none
    """
    if not reference:
        raise UsageError("no answers to compare", todo="ask at least one question")
    by_id = {answer.id: answer for answer in candidate}
    kinds = {answer.id: answer.kind for answer in reference}
    if len(candidate) != len(reference) or {answer.id: answer.kind for answer in candidate} != kinds:
        raise ShapeMismatch(
            f"{len(reference)} answers of the reference and {len(candidate)} of the candidate are not to the same questions",
            todo="ask both the same questions; without that nothing is paired",
        )
    pairs = [(answer, by_id[answer.id]) for answer in reference]
    groups = {"all": pairs}
    for kind in dict.fromkeys(kinds.values()):
        if kind != "all":
            groups[kind] = [pair for pair in pairs if pair[0].kind == kind]
    return {kind: _compare(kind, group) for kind, group in groups.items()}


def _compare(kind: str, pairs: Sequence[tuple[Answer, Answer]]) -> Comparison:
    n = len(pairs)
    before, after = (sum(pair[side].correct for pair in pairs) for side in (0, 1))
    lost = sum(a.correct and not b.correct for a, b in pairs)
    gained = sum(b.correct and not a.correct for a, b in pairs)
    return Comparison(
        kind, n, before, after, wilson(before, n), wilson(after, n), lost, gained, mcnemar(lost, gained),
        *paired_difference(lost, gained, n), sum(a.text == b.text for a, b in pairs),
    )  # fmt: skip


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """With an image and without apart; sorted by length, so that little is padded."""
    for has_image in (False, True):
        group = sorted((q for q in questions if (q.image is not None) == has_image), key=lambda q: len(q.prompt))
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _generate(
    model: Any, processor: Any, batch: Sequence[Question], max_new_tokens: int, device: str
) -> list[list[int]]:
    """New token ids a question, cut after the first stop token."""
    import torch

    inputs = _inputs(processor, batch).to(device)
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list | tuple) else {stop}
    pad = getattr(processor, "tokenizer", processor).pad_token_id
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # silence the model's own sampling defaults
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def _inputs(processor: Any, batch: Sequence[Question]) -> Any:
    """Tokens (and pixels) of a batch of user turns, padded on the left."""
    sees = hasattr(processor, "image_processor")
    images = [[_open(question.image)] for question in batch if question.image is not None]
    if not getattr(processor, "chat_template", None):
        if images:
            raise UsageError("the processor has no chat template to place an image with", todo="ask without images")
        return processor(text=[question.prompt for question in batch], padding=True, return_tensors="pt")
    texts = []
    for question in batch:
        content: Any = question.prompt
        if sees:
            shown = [{"type": "image"}] if question.image is not None else []
            content = [*shown, {"type": "text", "text": question.prompt}]
        turn = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    # the template has written <bos> where the model wants one: the tokenizer must not add a second
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    return processor(text=texts, images=images, **options) if images else processor(text=texts, **options)


def _open(image: Path | str | Image) -> Image:
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    if isinstance(image, Pillow.Image):
        return image.convert("RGB")
    try:
        with Pillow.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise SourceError(f"cannot be read as an image ({error})", where=str(image), todo="draw it again") from None


@contextmanager
def _padding_left(processor: Any) -> Iterator[None]:
    """The tokenizer pads on the left inside, and as before afterwards. One without a padding token gets its stop token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
