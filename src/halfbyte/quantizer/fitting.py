"""The part of a job that fits: which tensors, how, on which rows; then the decoder layer by layer, then the linears outside it.

    plan says nf4, a linear of a decoder layer, calibration given   walked (`layerwise`), fitted to what it reads
    plan says nf4, anything else                                    fitted without data, by `scale`, whatever the method

Linears outside the decoder layers (a head or a tower that a preset releases) and experts that no row reached have no inputs here.
They get the best that needs none, and their entry in the record says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from halfbyte.errors import OutputError
from halfbyte.format.tensors import Source
from halfbyte.layers.fitting.method import Method
from halfbyte.progress import note, track
from halfbyte.quantizer.fitted import FittedTensors, Place, gain_of
from halfbyte.quantizer.journal import Journal
from halfbyte.recipe.decisions import Plan
from halfbyte.records import versions

if TYPE_CHECKING:
    from halfbyte.codec.fitting import Fit
    from halfbyte.layers.weights import PlainWeights
    from halfbyte.texts.calibration import Calibration


@dataclass
class Fitting:
    """How a job fits. `texts` is None for a method without calibration."""

    method: Method
    texts: Calibration | None
    device: str

    @property
    def detail(self) -> dict[str, Any]:
        """What, beside source and plan, the bytes depend on."""
        options = {**asdict(self.method), "dtype": self.method.compute_dtype(self.device)}
        options["calibration"] = self.texts and {"name": self.texts.name, "sha256": self.texts.sha256}
        return {**options, "version": versions()["halfbyte"], "device": self.device.partition(":")[0]}

    def run(self, source: Source, plan: Plan, places: Mapping[str, Place], journal: Journal) -> None:
        """Write every nf4 tensor that is due. raises as `quantize` does; PlanError if the decoder cannot be streamed"""
        decisions = {d.name: d for d in plan.decisions if d.action == "nf4"}
        infos = {info.name: info for info in source.tensors if info.name in decisions}
        todo = {name for name in infos if places[name].due}
        if not todo:
            return
        total, due = sum(i.nbytes for i in infos.values()), sum(infos[name].nbytes for name in todo)
        with track(f"fit ({self.method.method})", total) as advance:
            advance(total - due)

            def how(name: str, measured: bool) -> Fit:
                return self.method.fit_of(plan.blocksize_of(decisions[name]), measured=measured)

            store = FittedTensors(source, infos, places, journal, how, self.device, advance, todo)
            if self.texts is not None:
                self._walk(source, store, journal)
            for name in [name for name in infos if name in todo]:
                store.fit(name, None)

    def _walk(self, source: Source, store: FittedTensors, journal: Journal) -> None:
        """Fit the linears of the decoder layers, and keep in the journal what rows they were fitted on."""
        from halfbyte.layers.weights import PlainWeights

        weights = PlainWeights(source)
        try:
            self._walk_over(weights, store, journal)
        finally:
            weights.forget_scratch()

    def _walk_over(self, weights: PlainWeights, store: FittedTensors, journal: Journal) -> None:
        from halfbyte.codec.fitting import Moments
        from halfbyte.layers.fitting.layerwise import fit_layers
        from halfbyte.layers.streaming import StreamedModel
        from halfbyte.texts.calibration import Writing, calibration_rows

        method, dtype = self.method, self.method.compute_dtype(self.device)
        writing = Writing(method.max_new_tokens, self.device, dtype, method.batch, journal.work)
        assert self.texts is not None, "a walk has rows"
        rows, facts = calibration_rows(
            self.texts, weights, tokens=method.calibration_tokens, seed=method.seed, writing=writing
        )
        note(
            f"calibration: {facts['rows']} rows, {facts['tokens']} tokens of {facts['name']}, answers {facts['answers']}"
        )
        if journal.calibration is None:
            journal.append({"calibration": facts})
        elif journal.calibration["rows_digest"] != facts["rows_digest"]:
            raise OutputError(
                "the calibration rows are not those that this job began with (the source wrote other answers)",
                where=str(journal.work), todo="start over with --overwrite",
            )  # fmt: skip
        model = StreamedModel(weights, self.device, dtype)
        try:
            moments = partial(Moments, full=method.method == "gptq", device=self.device)
            fit_layers(model, rows, set(store.infos), store, moments, batch=method.batch, sequential=method.sequential)
        finally:
            model.close()

    def record(self, journal: Journal) -> dict[str, Any]:
        """What the quantize record says of the method, its data and its worth."""
        fits = {name: entry["fit"] for name, entry in journal.tensors.items() if entry.get("fit")}
        return {
            "name": self.method.method,
            "fit": {
                key: value
                for key, value in asdict(self.method.fit_of(64, measured=True)).items()
                if key not in ("method", "blocksize")
            },
            "sequential": self.method.sequential if self.texts is not None else None,
            "dtype": self.method.compute_dtype(self.device) if self.texts is not None else None,
            "device": self.device.partition(":")[0],
            **{key: getattr(self.method, key) for key in ("calibration_tokens", "max_new_tokens", "batch", "seed")},
            "calibration": journal.calibration,
            "gain": gain_of(fits),
        }
