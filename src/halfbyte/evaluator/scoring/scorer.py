"""Reference and candidates over the same rows: one vector per figure and candidate, one entry per scored position.

    reference    hidden states of all rows, kept (final norm's output: 2 or 4 bytes x hidden size a position)
    floor        the reference again, with one bf16 ulp of noise on the residual after every layer
    candidates   one after the other: hidden states, head, compared with the reference's, dropped

Nothing here averages: means, intervals and verdicts are made of the vectors (`statistics`), and whoever doubts a figure
has them. One model is in memory at a time, beside the reference's head: whole, or a layer at a time (`streaming`) where
it would take more than half of the memory. Both give the same bits. A candidate is scored against the bf16 of its own
base: this module knows one reference, and two bases are two calls over the same rows.

    score = keep_reference, then score_against.    A reference pack (`pack`) is the former's result in a file

Self-test: the first batch of the reference is run a second time. Its KLD against itself must be exactly 0, or the
kernels are not deterministic and every figure carries that noise; the result travels with the scores as `self_kld`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from halfbyte.device import check_device
from halfbyte.errors import PlanError, ShapeMismatch, SourceError
from halfbyte.evaluator.scoring.divergence import Prediction, delta_p, kl_divergence, predict
from halfbyte.evaluator.scoring.residuals import KeptResiduals, ResidualErrors, Sample, Tapped, shape_of
from halfbyte.layers.head import Head
from halfbyte.layers.model import HiddenStates, WholeModel, exact_float32
from halfbyte.layers.rows import Batch, Rows
from halfbyte.layers.streaming import Pass, Prepares, StreamedModel, must_stream
from halfbyte.layers.weights import Weights
from halfbyte.progress import track
from halfbyte.records import versions
from halfbyte.texts.vision.model import SeeingModel
from halfbyte.texts.vision.rows import PictureRows

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
    residual  `ResidualErrors.arrays`, None if not asked for; empty if its stream has another shape than the reference's
    """

    label: str
    digest: str
    kld: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    delta_p: np.ndarray
    residual: dict[str, np.ndarray] | None = None


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


@dataclass(frozen=True, eq=False)
class KeptReference:
    """All that scoring a candidate needs of a reference: its model may be gone.

    states       per batch of `rows.batches(batch)`: [scored, hidden] in the compute dtype, on the CPU
    head         None: not kept; a candidate's own stands in if its digest is `head_digest`
    head_digest  None: not computed (there is a head)
    facts        of the run that made it: device, device_name, dtype, attention, batch, streamed, versions
    residuals    its residual stream at a sample of positions, None if not asked for
    """

    rows: Rows
    batch: int
    states: Sequence[torch.Tensor]
    head: Head | None
    head_digest: str | None
    own: Reference
    floor: Candidate | None
    self_kld: float
    facts: dict[str, Any]
    residuals: KeptResiduals | None = None


class How(TypedDict, total=False):
    """How the arithmetic is done; every default is named.

    device     `cpu`, or a GPU
    dtype      `float32` or `bfloat16` (float32): of everything before the head, which is float32 always
    batch      rows at a time (8); it changes kernels' rounding, for all models alike
    floor      also run the reference with noise (True)
    streaming  `auto`: layer by layer if the whole would take more than half of the free memory; True, False
    layers     also compare the residual stream after every layer (False)
    """

    device: str
    dtype: str
    batch: int
    floor: bool
    layers: bool
    streaming: bool | Literal["auto"]


def score(reference: Weights, candidates: Sequence[Weights], rows: Rows, **how: Unpack[How]) -> Scores:
    """Score every candidate against `reference` over `rows`, one model at a time (see `How`).

    raises  SourceError, PlanError (a model cannot be built), ShapeMismatch (another vocabulary), UsageError (device)
    """
    kept = keep_reference(reference, rows, **how)
    return score_against(kept, candidates, device=kept.facts["device"], streaming=kept.facts["streamed"])


def keep_reference(reference: Weights, rows: Rows, **how: Unpack[How]) -> KeptReference:
    """The reference's part of `score`: its hidden states, own vectors, self-test and floor; the model is let go."""
    device, dtype, batch = how.get("device", "cpu"), how.get("dtype", "float32"), how.get("batch", 8)
    check_device(device)
    streaming = how.get("streaming", "auto")
    streamed = streams(reference, rows, (device, dtype), streaming)
    run = Run(opener(rows, device, dtype, streamed), rows, batch)
    kept = run.keep(reference, floor=how.get("floor", True), layers=how.get("layers", False))
    kept.facts.update(
        device=device, device_name=_device_name(device), dtype=dtype, attention="sdpa", batch=batch, streamed=streamed
    )
    return kept


def score_against(
    kept: KeptReference,
    candidates: Sequence[Weights],
    *,
    device: str = "cpu",
    streaming: bool | Literal["auto"] = "auto",
) -> Scores:
    """Score candidates against a reference kept before, in the dtype and the batches it was kept in.

    On another device than the reference's, the kernels differ too; `facts["device_of_reference"]` then says so.
    raises  SourceError if no head was kept and a candidate's is not the reference's; else as `score`
    """
    check_device(device)
    dtype = kept.facts["dtype"]
    here = kept if kept.head is None else replace(kept, head=kept.head.to(device))
    found = []
    for weights in candidates:
        streamed = streams(weights, kept.rows, (device, dtype), streaming)
        found.append(Run(opener(kept.rows, device, dtype, streamed), kept.rows, kept.batch).candidate(here, weights))
    scores = Run(opener(kept.rows, device, dtype, False), kept.rows, kept.batch).scores(kept, found)
    scores.facts.update(device=device, device_name=_device_name(device), versions=versions())
    if scores.facts["device_name"] != kept.facts["device_name"]:
        scores.facts["device_of_reference"] = kept.facts["device_name"]
    return scores


def streams(weights: Weights, rows: Rows, where: tuple[str, str], streaming: bool | Literal["auto"]) -> bool:
    """Whether to go layer by layer; raises PlanError where pictures would have to (a whole model that does not fit says so)."""
    if isinstance(rows, PictureRows):
        if streaming is True:
            raise PlanError(
                "rows with pictures cannot be scored layer by layer", where=rows.protocol, todo="score it whole"
            )
        return False
    return must_stream(weights, *where) if streaming == "auto" else streaming


def opener(rows: Rows, device: str, dtype: str, streamed: bool) -> OpenModel:
    def open_model(weights: Weights) -> HiddenStates:
        if streamed:
            return StreamedModel(weights, device, dtype)
        if isinstance(rows, PictureRows):
            seeing = SeeingModel(weights, device, dtype)
            seeing.check_head([int(t) for t in rows.tokens[0] if int(t) not in rows.frame_ids][:8])  # words alone
            return seeing
        model = WholeModel(weights, device, dtype)
        model.check_head(rows.tokens[0][:8].tolist())
        return model

    return open_model


class Run:
    """One scoring run, whatever the models' weights pass through (`open_model`: whole, or layer by layer)."""

    def __init__(self, open_model: OpenModel, rows: Rows, batch: int) -> None:
        self.open_model, self.rows, self.batch = open_model, rows, batch
        self.batches = rows.batches(batch)
        row, position, label, self.order = in_row_order(self.batches)
        self.row, self.position, self.label = row, position, label

    def score(self, reference: Weights, candidates: Sequence[Weights], *, floor: bool) -> Scores:
        kept = self.keep(reference, floor=floor)
        return self.scores(kept, [self.candidate(kept, weights) for weights in candidates])

    def keep(self, reference: Weights, *, floor: bool, layers: bool = False) -> KeptReference:
        """Hidden states of all rows, the self-test, the reference's own vectors, the floor, and a sample of the residuals."""
        model = self.open_model(reference)
        try:
            first = self.batches[:1]
            residuals = self._tap(model) if layers and isinstance(model, Tapped) else None
            prepare(model, [(self.batches, None), (first, None), *([(self.batches, FLOOR_SEED)] if floor else [])])
            states = [states.cpu() for states in self._states(model, f"reference {reference.label}")]
            again = next(iter(model.hidden_states(first)))
            compared = _compare_batch(first[0], states[0], again, model.head, model.head)
            self_kld = max((float(part.kld.abs().max()) for part in compared), default=0.0)
            own = self._own(reference, states, model.head)
            noisy = None
            if floor:
                noisy = self._candidate(model, states, model.head, ("floor", reference.digest), FLOOR_SEED)
            facts = {"versions": versions()}
            return KeptReference(
                self.rows, self.batch, states, model.head, None, own, noisy, self_kld, facts, residuals
            )
        finally:
            model.close()

    def candidate(self, kept: KeptReference, weights: Weights) -> Candidate:
        """Vectors of one candidate against `kept`, whose rows and batch are this run's."""
        model = self.open_model(weights)
        try:
            errors = None if kept.residuals is None else ResidualErrors(kept.residuals)
            if errors is not None and isinstance(model, Tapped) and shape_of(model) == errors.kept.shape:
                model.tap = errors
            prepare(model, [(self.batches, None)])
            head = kept.head
            if head is None:
                head = model.head
                if head.digest() != kept.head_digest:
                    raise SourceError(
                        "the reference pack holds no head, and this candidate's is not the reference's",
                        where=weights.label,
                        todo="write the pack with its head",
                    )
            found = self._candidate(model, kept.states, head, (weights.label, weights.digest), None)
            return found if errors is None else replace(found, residual=errors.arrays())
        finally:
            model.close()

    def scores(self, kept: KeptReference, candidates: list[Candidate]) -> Scores:
        import numpy as np

        documents = np.array(self.rows.documents, dtype=object)[self.row]
        facts = {
            "rows": self.rows.digest, "protocol": self.rows.protocol, "protocol_version": self.rows.version,
            "n": len(self.row), "documents": len(set(self.rows.documents)), **kept.facts,
        }  # fmt: skip
        return Scores(
            self.row, self.position, self.label, documents, kept.own, candidates, kept.floor, kept.self_kld, facts
        )

    def _tap(self, model: Tapped) -> KeptResiduals:
        shape = shape_of(model)
        itemsize = next(iter(model.decoder.parameters())).element_size()
        model.tap = found = KeptResiduals(Sample(self.rows, self.batch, shape, itemsize), shape)
        return found

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
                for prediction, _ in predictions(batch, states, head):
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
        kld, nll, agrees, delta = (
            self._sorted([getattr(c, key) for c in compared]) for key in ("kld", "nll", "agrees", "delta_p")
        )
        return Candidate(*name, kld, nll, agrees, delta)

    def _sorted(self, pieces: Sequence[torch.Tensor]) -> np.ndarray:
        import torch

        found: np.ndarray = torch.cat(list(pieces)).numpy()[self.order]
        return found


def in_row_order(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, position, label, order) of every scored position: what comes batch by batch, taken at `order`, is row by row."""
    import numpy as np

    row, label = (np.concatenate([getattr(batch, key) for batch in batches]) for key in ("rows", "labels"))
    position = np.concatenate([batch.scored[1] for batch in batches])
    order = np.lexsort((position, row))
    return row[order], position[order], label[order], order


def prepare(model: HiddenStates, passes: Sequence[Pass]) -> None:
    if isinstance(model, Prepares):
        model.prepare(passes)


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
        pairs = zip(predictions(batch, mine, head), predictions(batch, theirs, their_head), strict=True)
        return [
            _Compared(kl_divergence(p, q).cpu(), q.nll.cpu(), (p.top == q.top).cpu(), delta_p(p, q).cpu())
            for (p, _), (q, _) in pairs
        ]


def predictions(batch: Batch, states: torch.Tensor, head: Head) -> Iterator[tuple[Prediction, torch.Tensor]]:
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
