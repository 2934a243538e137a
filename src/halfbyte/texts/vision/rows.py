"""Rows that carry pixels: `kld[assistant,on-policy,image]`, version 1.

    prompt of the template with the image's soft tokens, as the processor renders it | answer, as the reference wrote it

Reference and candidates read the same ids and the same pixel arrays, made once. Predictions of answer tokens count, a
picture is a document (two questions about one picture are not independent).

**Content and frame.** Of an answer "7<turn|>" the reader wants the 7; that the turn ends there is certain in any candidate,
and each such token pulls the mean towards 0. With answers this short that is half of all tokens. So the tokens that the
tokenizer calls special or added (end of turn, thought channel) are *frame*, the others *content*; figures are over content,
and frame is reported by itself.

One row a batch: processors pad pictures in as many ways as there are models, and a batch of one needs no padding.

The catch: pixel arrays are kept in memory for all passes (a Gemma picture of 280 soft tokens: 7.7 MB in float32).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError, SourceError, UsageError
from halfbyte.format.shards import hash_file
from halfbyte.images import open_image
from halfbyte.layers.rows import Batch, PictureBatch, Rows
from halfbyte.layers.weights import Weights
from halfbyte.progress import track
from halfbyte.records import digest
from halfbyte.texts.protocols import IMAGE, VERSIONS, check_bos, is_instruct, tokenizer_facts
from halfbyte.texts.vision.prompts import PicturePrompt

if TYPE_CHECKING:
    import numpy as np

#: of all pixel arrays together
MAX_PIXEL_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class PictureRows(Rows):
    """Rows with a picture each.

    inputs     per row: the model's further arguments; those a token has a value of are as long as the row
    frame_ids  token ids that are frame: not in the headline figures
    """

    inputs: Sequence[Mapping[str, np.ndarray]] = ()
    frame_ids: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """Of the rows, of every input array, and of what is frame."""
        return digest({
            "rows": super().digest, "inputs": [hash_arrays(each) for each in self.inputs], "frame": list(self.frame_ids)
        })  # fmt: skip

    def batches(self, size: int) -> list[Batch]:
        """Every row by itself, longest first, whatever `size` is."""
        found: list[Batch] = []
        for row in self.order():
            plain = self._batch(row)
            found.append(PictureBatch(plain.tokens, plain.scored, plain.labels, plain.rows, self.inputs[int(row[0])]))
        return found

    def order(self, size: int = 1) -> list[np.ndarray]:
        return super().order(1)


@dataclass(frozen=True, eq=False)
class Seen:
    """A question as the model is given it: ids of the prompt (soft tokens in place), the further arguments, and the file's hash."""

    prompt: PicturePrompt
    ids: list[int]
    inputs: dict[str, np.ndarray]
    sha256: str


def sees(weights: Weights) -> bool:
    """Whether the model has a vision tower, a processor and a chat template to place an image with."""
    config = weights.config.get("vision_config")
    if not isinstance(config, dict) or not config:
        return False
    return any(weights.companions_folder().glob("*processor_config.json"))


def load_processor(weights: Weights) -> Any:
    """The processor from the reference's own files.

    raises UsageError (the model takes no images, or has no turn frame), SourceError (transformers cannot read it)
    """
    if not sees(weights):
        raise UsageError(
            f"{weights.label} takes no images (no vision tower, or no processor beside it)", where=IMAGE,
            todo="leave the pictures out, or name a checkpoint folder with its processor's files",
        )  # fmt: skip
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            weights.companions_folder(), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(
            f"no processor that transformers can read ({str(error).splitlines()[0][:200]})",
            where=weights.label,
            todo="put the processor's files beside the weights",
        ) from None
    if not hasattr(processor, "image_processor") or not is_instruct(processor):
        raise UsageError("its processor has no chat template for images", where=IMAGE, todo="leave the pictures out")
    return processor


def look(processor: Any, prompts: Sequence[PicturePrompt]) -> list[Seen]:
    """Every picture decoded and every prompt rendered, once; raises SourceError (a picture), UsageError (too many)."""
    found, total = [], 0
    with track("pictures", len(prompts), "pictures") as advance:
        for prompt in prompts:
            found.append(see(processor, prompt))
            total += sum(array.nbytes for array in found[-1].inputs.values())
            if total > MAX_PIXEL_BYTES:
                raise UsageError(
                    f"the first {len(found)} pictures take more than {MAX_PIXEL_BYTES >> 30} GiB as pixels",
                    where="--data",
                    todo="use fewer: --limit",
                )
            advance(1)
    return found


def see(processor: Any, prompt: PicturePrompt) -> Seen:
    """One picture decoded and its prompt rendered; raises SourceError (a picture), PlanError (a processor that makes no pixels)."""
    content = [{"type": "image"}, {"type": "text", "text": prompt.prompt}]
    turn = [{"role": "user", "content": content}]
    image = open_image(prompt.image)
    try:
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        # the template has written <bos> where the model wants one: the tokenizer must not add a second
        made = processor(text=[text], images=[[image]], return_tensors="np", add_special_tokens=False)
    except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
        raise SourceError(
            f"the model's processor refuses it ({str(error)[:200]})",
            where=str(prompt.image),
            todo="use another picture",
        ) from None
    ids = [int(token) for token in made["input_ids"][0]]
    check_bos(processor.tokenizer, ids)
    inputs = {name: made[name] for name in sorted(made) if name not in ("input_ids", "attention_mask")}
    if not any(array.shape != (1, len(ids)) for array in inputs.values()):
        raise PlanError("its processor makes no pixels of an image", where=type(processor).__name__, todo="report it")
    return Seen(prompt, ids, inputs, hash_file(prompt.image))


def picture_rows(
    processor: Any, seen: Sequence[Seen], answers: Sequence[Sequence[int]], facts: Mapping[str, Any]
) -> PictureRows:
    """Prompts with the answers that the reference wrote (`vision.answers`); empty answers are left out, and counted.

    facts  of the generation
    raises SourceError if nothing is left
    """
    import numpy as np

    tokenizer = processor.tokenizer
    frame = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kept = [(one, list(answer)) for one, answer in zip(seen, answers, strict=True) if len(answer)]
    if not any(token not in frame for _, answer in kept for token in answer):
        raise SourceError("no answer has a word in it", where=IMAGE, todo="ask something else, or a trained model")
    tokens = [np.array([*one.ids, *answer], np.int32) for one, answer in kept]
    scored = []
    for (one, _), ids in zip(kept, tokens, strict=True):
        scored.append(np.arange(len(ids)) >= len(one.ids) - 1)
        scored[-1][-1] = False
    inputs = [lengthened(one, len(ids)) for (one, _), ids in zip(kept, tokens, strict=True)]
    of_frame = sum(token in frame for _, answer in kept for token in answer)
    about = {
        **tokenizer_facts(tokenizer), **facts, "empty_answers": len(seen) - len(kept), "batch": 1,
        "pictures": len({one.sha256 for one, _ in kept}), "frame_tokens": of_frame,
        "content_tokens": sum(len(answer) for _, answer in kept) - of_frame,
        "images": digest([one.sha256 for one, _ in kept]),
    }  # fmt: skip
    return PictureRows(
        IMAGE, VERSIONS[IMAGE], tokens, scored, _documents([one for one, _ in kept]), about,
        [one.prompt.prompt for one, _ in kept], inputs, tuple(sorted(frame)),
    )  # fmt: skip


def lengthened(one: Seen, length: int) -> dict[str, np.ndarray]:
    """The arguments for a row of `length`: what has a value a token (its type) is 0, text, for the answer."""
    import numpy as np

    there = len(one.ids)
    return {
        name: np.pad(array, ((0, 0), (0, length - there))) if array.shape == (1, there) else array
        for name, array in one.inputs.items()
    }


def _documents(kept: Sequence[Seen]) -> list[str]:
    """Names of the pictures, by content: equal files are one document, different files of one name are two."""
    names: dict[str, str] = {}
    for one in kept:
        name = one.prompt.image.name
        if one.sha256 not in names:
            names[one.sha256] = f"{name} ({one.sha256[:8]})" if name in names.values() else name
    return [names[one.sha256] for one in kept]


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, dtypes, shapes and bytes."""
    parts = {
        name: [array.dtype.str, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        for name, array in arrays.items()
    }
    return digest(parts)
