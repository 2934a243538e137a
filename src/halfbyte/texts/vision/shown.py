"""Pictures among the calibration rows: which are shown, with which answers, and rows that hold both kinds.

    question and soft tokens, as the processor renders them | the answer: given, or the source's own | every position counts but the last

A language model with a vision tower reads two kinds of input: embeddings of tokens, and what the projector makes of patches. Their
activations differ, and a weight fitted to the first alone is fitted to half of what it will read. So soft tokens count here like
words; the tower itself stays as it is and is not fitted.

How many tokens a picture takes only its processor knows. So each candidate is processed once for its length, and those that are drawn
once more for their pixels: never all pictures of a file at a time. Of a large file `MOST` are looked at, drawn from the seed.

The catch: pixels of the drawn ones stay in memory until the walk ends (a Gemma picture of 280 soft tokens: 7.7 MB in float32; 65,536 tokens
of nothing but pictures: 1.6 GB). Answers are written by the whole model, as answers to chats are.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError
from halfbyte.images import open_image, picture_hash
from halfbyte.layers.rows import Batch, PictureBatch, Rows
from halfbyte.layers.weights import Weights
from halfbyte.progress import note, track
from halfbyte.records import digest
from halfbyte.texts import protocols
from halfbyte.texts.vision.answers import write_picture_answers
from halfbyte.texts.vision.drawn import draw_pictures
from halfbyte.texts.vision.prompts import PicturePrompt
from halfbyte.texts.vision.rows import Seen, hash_arrays, lengthened, load_processor, look, see, sees

if TYPE_CHECKING:
    import numpy as np

    from halfbyte.texts.calibration import Writing

#: pictures of a file whose lengths are found out
MOST = 256


@dataclass(frozen=True, eq=False)
class MixedRows(Rows):
    """Rows of which some have a picture.

    inputs  per row: the model's further arguments, None for text alone
    """

    inputs: Sequence[Mapping[str, np.ndarray] | None] = ()

    @property
    def digest(self) -> str:
        """Of the rows and of every input array."""
        return digest({"rows": super().digest, "inputs": [None if i is None else hash_arrays(i) for i in self.inputs]})

    def batches(self, size: int) -> list[Batch]:
        """Texts in batches, longest first, then every picture by itself."""
        found: list[Batch] = []
        for rows in self.order(size):
            plain, inputs = self._batch(rows), self.inputs[int(rows[0])]
            if inputs is None:
                found.append(plain)
            else:
                found.append(PictureBatch(plain.tokens, plain.scored, plain.labels, plain.rows, inputs))
        return found

    def order(self, size: int) -> list[np.ndarray]:
        import numpy as np

        longest = sorted(range(len(self.tokens)), key=lambda row: (-len(self.tokens[row]), row))
        texts = [row for row in longest if self.inputs[row] is None]
        pictures = [row for row in longest if self.inputs[row] is not None]
        return [np.array(texts[at : at + size]) for at in range(0, len(texts), size)] + [
            np.array([r]) for r in pictures
        ]


@dataclass(eq=False)
class Pictures:
    """Questions about pictures as one model reads them; none if it takes no pictures.

    prompts   candidates
    lengths   tokens of each, soft tokens included, without an answer
    left_out  pictures that were given and are not among them
    """

    prompts: Sequence[PicturePrompt] = ()
    lengths: list[int] = field(default_factory=list)
    left_out: int = 0
    processor: Any = None
    _drawn: Any = field(default=None, repr=False)

    def rows(
        self, chosen: Sequence[int], weights: Weights, writing: Writing, *, fits: bool
    ) -> tuple[list[list[int]], list[Mapping[str, np.ndarray]], str | None]:
        """Token ids and further arguments of the candidates `chosen`, and the digest of the trace if the source wrote answers."""
        if not chosen:
            return [], [], None
        seen = look(self.processor, [self.prompts[at] for at in chosen])
        asked = [one for one in seen if one.prompt.answer is None]
        written: list[list[int]] = [[] for _ in asked]
        trace = None
        if asked and fits:
            written, about = write_picture_answers(
                weights, self.processor, asked, writing.cache,
                max_new_tokens=writing.max_new_tokens, device=writing.device, dtype=writing.dtype,
            )  # fmt: skip
            trace = str(about["trace"])
        answers = protocols.answer_ids(self.processor.tokenizer, [one.prompt.answer for one in seen], written)
        ids = [[*one.ids, *answer] for one, answer in zip(seen, answers, strict=True)]
        return ids, [lengthened(one, len(row)) for one, row in zip(seen, ids, strict=True)], trace

    def hashes(self, chosen: Sequence[int]) -> set[str]:
        """What the pictures `chosen` are recognised by."""
        return {picture_hash(open_image(self.prompts[at].image)) for at in chosen}

    def close(self) -> None:
        """Delete the files that were drawn, if any were."""
        if self._drawn is not None:
            self._drawn.cleanup()


def pictures_for(
    weights: Weights, prompts: Sequence[PicturePrompt], drawn: int, seed: int, writing: Writing
) -> Pictures:
    """The candidates: `prompts`, and `drawn` pictures of our own, if the model takes pictures. Close it.

    One candidate is tried out first: a model that adds image features between its layers cannot be walked with pictures, and is
    better told so now than after answers have been written.

    raises  as `load_processor`, `see` and StreamedModel.enter, of pictures that somebody gave; ours are then left out, with a note
    """
    if not (prompts or drawn) or not sees(weights):
        return Pictures(left_out=len(prompts))
    chosen = (
        sorted(random.Random(seed).sample(range(len(prompts)), MOST)) if len(prompts) > MOST else range(len(prompts))
    )
    found = [prompts[at] for at in chosen]
    folder = tempfile.TemporaryDirectory(prefix="halfbyte-") if drawn else None
    if folder is not None:
        own = draw_pictures(Path(folder.name), drawn)
        found += [PicturePrompt(path.stem, kind, question, path, None) for kind, question, path in own]
    made = Pictures(found, [], len(prompts) - len(chosen), None, folder)
    try:
        made.processor = load_processor(weights)
        _try_out(weights, see(made.processor, found[0]), writing)
        with track("pictures", len(found), "pictures") as advance:
            for prompt in found:
                made.lengths.append(len(see(made.processor, prompt).ids))
                advance(1)
    except BaseException as error:
        made.close()
        if prompts or not isinstance(error, HalfbyteError):
            raise
        note(f"no pictures in the calibration: {error.what}")
        return Pictures()
    return made


def _try_out(weights: Weights, seen: Seen, writing: Writing) -> None:
    """Bring one picture to the first layer; raises PlanError, SourceError if that cannot be done."""
    import numpy as np
    import torch

    from halfbyte.layers.streaming import StreamedModel, Work

    ids, first = np.array([seen.ids], np.int64), np.array([0])
    batch = PictureBatch(ids, (first, first), ids[0, 1:2], first, seen.inputs)
    model = StreamedModel(weights, writing.device, writing.dtype)
    try:
        with torch.inference_mode():
            model.enter([Work(batch, 0, None)])
    finally:
        model.close()
