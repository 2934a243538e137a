"""What is scored: token ids, which of their predictions count, and which document each belongs to.

A protocol writes rows once; reference and every candidate then read the same ids in batches of the same shape, so that
nothing but the weights can differ (kernels round differently for different shapes). Rows are a file: with the same rows
somebody else gets the same figures, whatever became of the tokenizer.

    tokens     t0   t1   t2   t3   t4      one row: at most one window of one document
    scored      0    1    1    1    0      1 at position p: the prediction made *at* p, of the token at p + 1, counts

so the last position never counts, and the first counts if t0 is a `<bos>`. Documents are the unit of the statistics:
tokens of one document are not independent, documents are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError
from halfbyte.records import digest, write_bytes_atomic

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows, padded on the right to one length.

    tokens  int64 [rows, length]
    scored  (row in the batch, position), int64 [n] each: the predictions that count, row by row
    labels  int64 [n]: the token that each of them is about
    rows    int64 [n]: the row in `Rows` that each belongs to
    """

    tokens: np.ndarray
    scored: tuple[np.ndarray, np.ndarray]
    labels: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class PictureBatch(Batch):
    """One row, and what the model is given beside its token ids (name -> array, first axis of length 1 or patches)."""

    inputs: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one protocol.

    protocol, version  e.g. `kld[assistant,given]`, 1
    tokens             int32 [length] per row
    scored             bool [length] per row, see above
    documents          per row: the document it belongs to; several rows may share one
    facts              what made them (tokenizer hash, window, counts of words and bytes, ...): not in the digest
    texts              optional, per row: the text behind it, for people
    """

    protocol: str
    version: int
    tokens: Sequence[np.ndarray]
    scored: Sequence[np.ndarray]
    documents: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.scored) == len(self.documents)
        for row, (ids, mask) in enumerate(zip(self.tokens, self.scored, strict=True)):
            assert ids.shape == mask.shape, f"row {row}: mask and ids differ in length"
            assert len(ids) > 1, f"row {row}: one token predicts nothing"
            assert not mask[-1], f"row {row}: the last position predicts nothing"

    @property
    def digest(self) -> str:
        """sha256 of protocol, ids, masks and documents: equal rows, equal digest."""
        total = hashlib.sha256()
        for ids, mask in zip(self.tokens, self.scored, strict=True):
            total.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes() + mask.astype("u1").tobytes())
        names = {"protocol": self.protocol, "version": self.version, "documents": list(self.documents)}
        return digest({**names, "content": total.hexdigest()})

    @property
    def n(self) -> int:
        """Predictions that count."""
        return sum(int(mask.sum()) for mask in self.scored)

    def batches(self, size: int) -> list[Batch]:
        """All rows in batches of up to `size`, longest first (so memory is known from the first batch on).

        The order depends on nothing but the rows: every model sees the same batches.
        """
        return [self._batch(chosen) for chosen in self.order(size)]

    def order(self, size: int) -> list[np.ndarray]:
        """The rows of each of `batches(size)`."""
        import numpy as np

        order = sorted(range(len(self.tokens)), key=lambda row: (-len(self.tokens[row]), row))
        return [np.array(order[at : at + size]) for at in range(0, len(order), size)]

    def _batch(self, chosen: np.ndarray) -> Batch:
        import numpy as np

        length = max(len(self.tokens[row]) for row in chosen)
        tokens = np.zeros((len(chosen), length), np.int64)
        mask = np.zeros((len(chosen), length), bool)
        for at, row in enumerate(chosen):
            tokens[at, : len(self.tokens[row])] = self.tokens[row]
            mask[at, : len(self.tokens[row])] = self.scored[row]
        where, positions = np.nonzero(mask)
        return Batch(tokens, (where, positions), tokens[where, positions + 1], chosen[where])

    def save(self, path: Path) -> None:
        """Write an .npz (arrays compressed, the rest as JSON inside), atomically."""
        import numpy as np

        about = {
            "format": FORMAT, "protocol": self.protocol, "version": self.version, "digest": self.digest,
            "documents": list(self.documents), "facts": self.facts,
            "texts": None if self.texts is None else list(self.texts),
        }  # fmt: skip
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            tokens=np.concatenate(self.tokens).astype(np.int32),
            scored=np.concatenate(self.scored).astype(bool),
            lengths=np.array([len(ids) for ids in self.tokens], np.int64),
            about=np.frombuffer(json.dumps(about, ensure_ascii=False).encode(), np.uint8),
        )
        write_bytes_atomic(path, buffer.getvalue())


def load_rows(path: Path) -> Rows:
    """Rows from a file that `Rows.save` wrote; raises SourceError if it is not one or has been altered."""
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            cuts = np.cumsum(stored["lengths"])[:-1]
            tokens, scored = np.split(stored["tokens"], cuts), np.split(stored["scored"], cuts)
        assert about["format"] == FORMAT
        rows = Rows(
            about["protocol"], about["version"], tokens, scored, about["documents"], about["facts"], about["texts"]
        )
    except (OSError, ValueError, KeyError, AssertionError, zipfile.BadZipFile) as error:
        raise SourceError(f"not a file of rows ({error})", where=str(path), todo="build the rows again") from None
    if rows.digest != about["digest"]:
        raise SourceError("its content does not have the digest it states", where=str(path), todo="build it again")
    return rows
