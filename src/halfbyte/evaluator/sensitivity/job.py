"""`halfbyte sensitivity`: the record that a budget is spent by.

    source -> plan (which linears could be NF4) -> groups that loaders fuse -> rows of held-out text
    -> variants: each group alone in NF4-64 and in NF4-32; all at once in each; nothing at all
    -> of another method than rtn: every weight fitted in both sizes, in a streamed pass over calibration rows (fits)
    -> one streamed pass (carrying) -> nats, with standard errors (costs) -> OUT/halfbyte/sensitivity.json

"Nothing at all" must come out as exactly 0, or the kernels are not deterministic. "All at once" says how far costs add up.

What it costs on L layers, g groups a layer, T tokens: about g L forward passes over T tokens, reading the weights once; memory
2 g L residuals of T x hidden. A 31B (L 60, g 4, hidden 5376; T 1,024, float32): 240 passes of 62 TFLOP, 15 PFLOP; 11 GB of CPU memory for
residuals; on the GPU a layer in float32 (2.1 GB), its rounded linears (2 GB), the head in bf16 (2.6 GiB): a 24 GB card does. Not measured
at that size. A small model on a CPU: SmolLM2-135M, 480 tokens, minutes.

Answers in the model's own words rank groups better than other people's (docs/log.md). They are written with the whole model in memory; one
that does not fit is measured on chats that bring their answers, or on texts.

The catch: the data that chooses must not be the data that judges, so there is none built in: give text that is in no evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.device import check_device
from halfbyte.errors import OutputError, SourceError, UsageError
from halfbyte.evaluator.job.material import Material, gather_material, rows_of
from halfbyte.evaluator.job.scoring import device_name
from halfbyte.evaluator.job.settings import FRAME, GIVEN, OF_CHATS, ON_POLICY, RAW
from halfbyte.evaluator.sensitivity.carrying import CarryingModel, Variant
from halfbyte.evaluator.sensitivity.costs import cost_of, documents_of, klds_of, rank_correlation, standard_error
from halfbyte.evaluator.sensitivity.fits import Place, fitted
from halfbyte.evaluator.sensitivity.settings import method_of_costs, probing_of
from halfbyte.layers.fitting.method import Method
from halfbyte.layers.rows import Rows
from halfbyte.layers.streaming import must_stream
from halfbyte.layers.weights import Nf4Weights, PlainWeights, open_weights
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.recipe.budget.groups import Group, groups_of
from halfbyte.recipe.budget.sensitivity import MEASURED, NAME, tensors_digest
from halfbyte.recipe.skeleton import build_skeleton
from halfbyte.recipe.survey import plan_of
from halfbyte.records import read_record, write_record
from halfbyte.texts import protocols
from halfbyte.texts.calibration import chat_hashes, text_hashes

if TYPE_CHECKING:
    import numpy as np

_NOTHING = "nothing"


def sensitivity(
    source: str | Path,
    out: str | Path,
    *,
    data: Sequence[str | Path] = (),
    preset: str | Path = "decoder-only",
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Measure what each group of linears costs in NF4, alone; returns the record, written to OUT/halfbyte/sensitivity.json.

    source   bf16 folder, .gguf file or hub id
    out      a folder for the record (no checkpoint's)
    data     texts, or .jsonl of chats, as in `evaluate`; none that an evaluation will be made on
    preset   which linears could be NF4: `decoder-only`, `unsloth`, a TOML file
    device   `auto`, `cpu`, `cuda[:N]`
    options  any field of `Probing`

    raises UsageError, SourceError, PlanError (a model that cannot be streamed), OutputError
    """
    import torch

    probing, settings = probing_of(options)
    method = method_of_costs(probing)
    started, out = time.perf_counter(), Path(out)
    if (out / "config.json").exists():
        raise OutputError("holds a checkpoint; a record of the source is none of its own", where=str(out), todo="name another folder")  # fmt: skip
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(device)
    files = [data] if isinstance(data, str | Path) else list(data)
    if not files:
        raise UsageError("no text to measure on", where="--data", todo="give a text, or .jsonl of chats, that no evaluation uses")  # fmt: skip
    material = gather_material(files, settings.limit)
    weights = open_weights(source)
    try:
        if not isinstance(weights, PlainWeights) or isinstance(weights, Nf4Weights):
            raise SourceError("is not a source", where=str(source), todo="name the full-precision checkpoint")
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        work = _Work(weights, Place(device, dtype, settings.batch, out), method)
        protocol = _protocol(probing.protocol, weights, material, (device, dtype))
        rows = rows_of(protocol, weights, material, settings, (out / "traces", device, dtype))
        body = work.measure(rows, preset, _hashed(protocol, material))
        body["data"] = list(material.files_of(protocol))
        body["settings"] = {
            **asdict(probing), "protocol": protocol, "dtype": dtype, "preset": str(preset),
            "calibration": None if method.calibration is None else str(method.calibration),
        }  # fmt: skip
    finally:
        weights.close()
    body["run"] = {
        "seconds": round(time.perf_counter() - started, 3), "device": device, "device_name": device_name(device),
        "peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": peak_gpu_bytes(device),
    }  # fmt: skip
    write_record(out, NAME, body)
    return read_record(out, NAME) or body


def _protocol(asked: str | None, weights: PlainWeights, material: Material, place: tuple[str, str]) -> str:
    """What was asked for, or what the data and the model allow; raises UsageError if the data has nothing for it.

    Chats are answered by the model itself, for its own words are what it will read in use; answers that came with them stand in where
    it does not fit into memory as a whole (place: device, dtype).
    """
    chats = [] if material.chats_built_in else material.chats
    chosen = asked
    if chosen is None:
        instruct = protocols.is_instruct(protocols.load_tokenizer(weights))
        if material.given_text or not chats:
            chosen = FRAME if instruct else RAW
        else:
            chosen = GIVEN if must_stream(weights, *place) and all(chat.response for chat in chats) else ON_POLICY
    if not (chats if chosen in OF_CHATS else material.given_text):
        kind = "chats (.jsonl)" if chosen in OF_CHATS else "a text"
        raise UsageError(f"{chosen} needs {kind}", where="--data", todo=f"give {kind} that no evaluation uses")
    return chosen


@dataclass(frozen=True)
class _Work:
    weights: PlainWeights
    place: Place
    method: Method

    def measure(self, rows: Rows, preset: str | Path, measured: Sequence[tuple[str, set[str]]]) -> dict[str, Any]:
        """Everything in the record that is about the model and the rows; `measured`: names and hashes of their documents."""
        plan = plan_of(self.weights.source, preset=preset, allow_disagreement=True)
        groups = groups_of(plan.decisions, build_skeleton(self.weights.config))
        model = CarryingModel(self.weights, self.place.device, self.place.dtype)
        try:
            inside = [(group, first) for group in groups if (first := _first_layer(model, group)) is not None]
            if not inside:
                raise SourceError("no linear of a decoder layer could be NF4", where=self.weights.label, todo="see halfbyte plan")  # fmt: skip
            names = {name for group, _ in inside for name in group.tensors}
            with fitted(self.method, self.weights, names, measured, self.place) as (model.coarse, weights):
                found = self._costs(model, inside, rows)
        finally:
            model.close()
        there = {group.name for group, _ in inside}
        return {
            "method": f"{self.method.method}, one group at a time, float64 KLD of the whole vocabulary",
            "weights": weights,
            "unmeasured": [module for group in groups if group.name not in there for module in group.modules],
            **found,
            "rows": {"digest": rows.digest, "protocol": rows.protocol, "n": rows.n, "documents": len(set(rows.documents)), "facts": rows.facts},
            "source": {
                "label": self.weights.label, "digest": self.weights.digest,
                "tensors": tensors_digest((info.name, info.shape) for info in self.weights.source.tensors),
            },
        }  # fmt: skip

    def _costs(self, model: CarryingModel, inside: Sequence[tuple[Group, int]], rows: Rows) -> dict[str, Any]:
        """Every group in both sizes, all at once, and nothing at all."""
        batches = rows.batches(self.place.batch)
        singles = [_single(group, choice, first) for group, first in inside for choice in MEASURED]
        together = frozenset().union(*(_keys(group) for group, _ in inside))
        joint = [Variant("all", choice, together, size) for choice, size in MEASURED.items()]
        singles.sort(key=lambda variant: variant.first)
        every = [Variant(_NOTHING, "", frozenset(), 64), *joint, *singles]
        document = documents_of(batches, rows)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        tokens: dict[tuple[str, str], np.ndarray] = {}
        passes = _passes(every, model.carried_at_once(batches))
        for some in passes:
            states = model.carry(batches, some)
            for variant, kld in zip(some, klds_of(model.head, batches, states, some), strict=True):
                name = (variant.name, variant.choice)
                found[name], tokens[name] = {**cost_of(kld, document), "drift": variant.drift}, kld
                variant.states = []
        measured = [_measured(group, first, found) for group, first in inside]
        for each in measured:
            coarse, fine = (tokens[each["name"], choice] for choice in MEASURED)
            each["saving_standard_error"] = standard_error(coarse - fine, document)
        return {
            "groups": measured,
            "joint": {c: {**found["all", c], "sum": sum(m["costs"][c]["kld"] for m in measured)} for c in MEASURED},
            "self_kld": found[_NOTHING, ""]["kld"],
            "drift_rank_correlation": {
                c: {"spearman": rank_correlation(*zip(*((m["costs"][c]["drift"], m["costs"][c]["kld"]) for m in measured), strict=True)), "n": len(measured)}
                for c in MEASURED
            },
            "passes": len(passes),
        }  # fmt: skip


def _hashed(protocol: str, material: Material) -> list[tuple[str, set[str]]]:
    """What the documents of a protocol are recognised by."""
    if protocol in OF_CHATS:
        return [(chat.name, chat_hashes(chat)) for chat in material.chats]
    return [(document.name, text_hashes(document.text)) for document in material.documents]


def _keys(group: Group) -> frozenset[str]:
    return frozenset(f"{module}.weight" for module in group.modules)


def _first_layer(model: CarryingModel, group: Group) -> int | None:
    layers = {model.layer_of(key) for key in _keys(group)}
    return layers.pop() if len(layers) == 1 else None


def _single(group: Group, choice: str, first: int) -> Variant:
    return Variant(group.name, choice, _keys(group), MEASURED[choice], first)


def _measured(group: Group, first: int, found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    costs = {choice: found[group.name, choice] for choice in MEASURED}
    return {"name": group.name, "modules": list(group.modules), "layer": first, "costs": costs}


def _passes(variants: Sequence[Variant], at_once: int) -> list[list[Variant]]:
    """In the order given (by first layer), so many a pass."""
    return [list(variants[at : at + at_once]) for at in range(0, len(variants), at_once)]
