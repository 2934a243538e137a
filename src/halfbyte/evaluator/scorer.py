"""Reference and candidates over the same rows: one vector per figure and candidate, one entry per scored position.

    reference    hidden states of all rows, kept (final norm's output: 2 or 4 bytes x hidden size a position)
    floor        the reference again, with one bf16 ulp of noise on the residual after every layer
    candidates   one after the other: hidden states, head, compared with the reference's, dropped

Nothing here averages: means, intervals and verdicts are made of the vectors (`statistics`), and whoever doubts a figure
has them. One model is in memory at a time, beside the reference's head. A candidate is scored against the bf16 of its own
base: this function knows one reference, and two bases are two calls over the same rows.

Self-test: the first batch of the reference is run a second time. Its KLD against itself must be exactly 0, or the
kernels are not deterministic and every figure carries that noise; the result travels with the scores as `self_kld`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.device import check_device
from halfbyte.errors import ShapeMismatch
from halfbyte.evaluator.divergence import Prediction, delta_p, kl_divergence, predict
from halfbyte.evaluator.model import Head, HiddenStates, WholeModel, exact_float32
from halfbyte.evaluator.rows import Batch, Rows
from halfbyte.evaluator.weights import Weights
from halfbyte.progress import track
from halfbyte.records import versions

if TYPE_CHECKING:
    import numpy as np
    import torch

#: positions whose logits exist at a time (128 x 262,144 x float32 = 128 MiB, a few times over)
POSITIONS = 128
FLOOR_SEED = 4
OpenModel = Callable[[Weights], HiddenStates]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One candidate's vectors, aligned with `Scores.row` and `Scores.position`.

    kld       float64, nats: KL(reference || candidate)
    nll       float64, nats, of the label
    agrees    bool: same token on top as the reference
    delta_p   float64: probability of the label, candidate minus reference
    """

    label: str
    digest: str
    kld: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    delta_p: np.ndarray


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference's own vectors: nll float64 (nats), top_probability float32 (of its likeliest token)."""

    label: str
    digest: str
    nll: np.ndarray
    top_probability: np.ndarray


@dataclass(frozen=True, eq=False)
class Scores:
    """Everything one run measured; all vectors have one entry per scored position, in the order of the rows.

    row, position  int64: row in `Rows`, position whose prediction it is
    label          int64: the token predicted
    document       object (str): the document of the row
    floor          the noisy reference as a candidate, None if not asked for
    self_kld       largest |KLD| of the reference against itself, first batch: must be 0.0
    facts          rows digest, protocol, device, dtype, attention, batch, versions
    """

    row: np.ndarray
    position: np.ndarray
    label: np.ndarray
    document: np.ndarray
    reference: Reference
    candidates: list[Candidate]
    floor: Candidate | None
    self_kld: float
    facts: dict[str, Any]


def score(
    reference: Weights,
    candidates: Sequence[Weights],
    rows: Rows,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch: int = 8,
    floor: bool = True,
) -> Scores:
    """Score every candidate against `reference` over `rows`; whole models, one at a time, on `device`.

    dtype   `float32` or `bfloat16`: of everything before the head, which is float32 always
    batch   rows at a time; it changes kernels' rounding, for all models alike
    floor   also run the reference with noise
    raises  SourceError, PlanError (a model cannot be built), ShapeMismatch (another vocabulary), UsageError (device)
    """
    check_device(device)

    def open_model(weights: Weights) -> HiddenStates:
        model = WholeModel(weights, device, dtype)
        model.check_head(rows.tokens[0][:8].tolist())
        return model

    run = Run(open_model, rows, batch)
    scores = run.score(reference, candidates, floor=floor)
    scores.facts.update(device=device, device_name=_device_name(device), dtype=dtype, attention="sdpa", batch=batch)
    return scores


class Run:
    """One scoring run, whatever the models' weights pass through (`open_model`: whole, or layer by layer)."""

    def __init__(self, open_model: OpenModel, rows: Rows, batch: int) -> None:
        import numpy as np

        self.open_model, self.rows = open_model, rows
        self.batches = rows.batches(batch)
        row = np.concatenate([b.rows for b in self.batches])
        position = np.concatenate([b.scored[1] for b in self.batches])
        #: sorts what comes batch by batch into the order of the rows
        self.order = np.lexsort((position, row))
        self.row, self.position = row[self.order], position[self.order]
        self.label = np.concatenate([b.labels for b in self.batches])[self.order]

    def score(self, reference: Weights, candidates: Sequence[Weights], *, floor: bool) -> Scores:
        import numpy as np

        model = self.open_model(reference)
        try:
            kept = [states.cpu() for states in self._states(model, f"reference {reference.label}")]
            again = next(iter(model.hidden_states(self.batches[:1])))
            self_kld = max(
                (
                    float(p.kld.abs().max())
                    for p in _compare_batch(self.batches[0], kept[0], again, model.head, model.head)
                ),
                default=0.0,
            )
            own = self._own(reference, kept, model.head)
            noisy = self._candidate(model, kept, model.head, ("floor", reference.digest), FLOOR_SEED) if floor else None
            head = model.head
        finally:
            model.close()
        found = []
        for weights in candidates:
            model = self.open_model(weights)
            try:
                found.append(self._candidate(model, kept, head, (weights.label, weights.digest), None))
            finally:
                model.close()
        documents = np.array(self.rows.documents, dtype=object)[self.row]
        facts = {
            "rows": self.rows.digest, "protocol": self.rows.protocol, "protocol_version": self.rows.version,
            "n": len(self.row), "documents": len(set(self.rows.documents)), "versions": versions(),
        }  # fmt: skip
        return Scores(self.row, self.position, self.label, documents, own, found, noisy, self_kld, facts)

    def _states(self, model: HiddenStates, title: str, noise_seed: int | None = None) -> Iterator[torch.Tensor]:
        with track(title, len(self.label), "tokens") as advance:
            for batch, states in zip(self.batches, model.hidden_states(self.batches, noise_seed), strict=True):
                yield states
                advance(len(batch.labels))

    def _own(self, weights: Weights, kept: Sequence[torch.Tensor], head: Head) -> Reference:
        import torch

        nll, top = [], []
        with torch.inference_mode(), exact_float32():
            for batch, states in zip(self.batches, kept, strict=True):
                for prediction, _ in _predictions(batch, states, head):
                    nll.append(prediction.nll.cpu())
                    top.append(prediction.top_probability.cpu())
        return Reference(weights.label, weights.digest, self._sorted(nll), self._sorted(top))

    def _candidate(
        self, model: HiddenStates, kept: Sequence[torch.Tensor], head: Head, name: tuple[str, str], seed: int | None
    ) -> Candidate:
        compared = [
            part
            for batch, mine, states in zip(self.batches, kept, self._states(model, name[0], seed), strict=True)
            for part in _compare_batch(batch, mine, states, head, model.head)
        ]
        vectors = [self._sorted([getattr(c, key) for c in compared]) for key in ("kld", "nll", "agrees", "delta_p")]
        return Candidate(*name, *vectors)

    def _sorted(self, pieces: Sequence[torch.Tensor]) -> np.ndarray:
        import torch

        found: np.ndarray = torch.cat(list(pieces)).numpy()[self.order]
        return found


@dataclass(frozen=True, eq=False)
class _Compared:
    kld: torch.Tensor
    nll: torch.Tensor
    agrees: torch.Tensor
    delta_p: torch.Tensor


def _compare_batch(
    batch: Batch, mine: torch.Tensor, theirs: torch.Tensor, head: Head, their_head: Head
) -> list[_Compared]:
    """Figures of one batch, POSITIONS at a time, on the CPU; `mine` is the reference."""
    import torch

    if head.weight.shape[0] != their_head.weight.shape[0]:
        raise ShapeMismatch(
            f"vocabularies of {head.weight.shape[0]} and {their_head.weight.shape[0]} tokens",
            where="head of reference and candidate",
            todo="a candidate is compared with the reference it was made from",
        )
    with torch.inference_mode(), exact_float32():
        pairs = zip(_predictions(batch, mine, head), _predictions(batch, theirs, their_head), strict=True)
        return [
            _Compared(kl_divergence(p, q).cpu(), q.nll.cpu(), (p.top == q.top).cpu(), delta_p(p, q).cpu())
            for (p, _), (q, _) in pairs
        ]


def _predictions(batch: Batch, states: torch.Tensor, head: Head) -> Iterator[tuple[Prediction, torch.Tensor]]:
    """(prediction, labels) of a batch's scored positions, POSITIONS at a time."""
    import torch

    labels = torch.from_numpy(batch.labels)
    for begin in range(0, len(labels), POSITIONS):
        some = labels[begin : begin + POSITIONS]
        yield predict(head.logits(states[begin : begin + POSITIONS]), some), some


def _device_name(device: str) -> str:
    import torch

    if device == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device)
