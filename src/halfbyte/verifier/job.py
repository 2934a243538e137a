"""`halfbyte verify`: the order of the checks, and the record they make.

    structure -> (only if sound) layout -> inventory -> kept bytes and codes -> config, companions, digests -> loaders -> stock

Nothing raises on a bad checkpoint: a fault is a failed check with a sentence, so one run tells everything. What raises is
a wrong call (no such folder), and a plan or record that is not ours to read. A folder whose structure is unsound goes no
further; above all not to transformers, which follows an index out of the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.device import check_device
from halfbyte.errors import HalfbyteError, SourceError, UsageError
from halfbyte.format.checkpoint import SafetensorsSource, open_source
from halfbyte.format.tensors import Source
from halfbyte.progress import track
from halfbyte.recipe.decisions import Plan
from halfbyte.records import digest, read_record, write_record
from halfbyte.verifier.against_plan import check_inventory, originals_of
from halfbyte.verifier.against_source import check_codes, check_kept
from halfbyte.verifier.checks import TITLES, Check, Fault, skipped, verdict
from halfbyte.verifier.companions import check_companions, check_config, check_digests
from halfbyte.verifier.fitted import check_fitted
from halfbyte.verifier.layout import check_layout, nf4_names
from halfbyte.verifier.loaders import check_loaders
from halfbyte.verifier.stock import check_stock
from halfbyte.verifier.structure import check_structure


def verify(
    out: Path | str,
    *,
    source: str | Path | Source | None = None,
    plan: Plan | None = None,
    generate: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Hold the checkpoint in `out` against docs/format.md, its plan and its source; writes and returns the verify record.

    source    the bf16 original (folder, .gguf, hub id or an open Source): kept bytes are compared, codes derived again, SQNR
              measured; without it the digests of the quantize record stand in where they can
    plan      what was decided; without it the record `halfbyte/plan.json`, if there
    generate  load it in stock transformers and ask the sanity prompts (needs the memory of the whole model); the answers
              become the generate record
    device    where stock transformers runs: `cpu` or `cuda[:N]`

    returns   {"passed": no check failed, "checks": [{id, title, status, detail, where}], "tensors": [{name, sqnr_db,
              scales_differing}], "loaders": the linter's matrix, "stock": the loader's report with `answers`: [{prompt,
              image, answer, tokens, seconds, tokens_per_second, finite}], "weights_digest", "with_source", "seconds"}; `sentences` puts the
              failed checks into words
    raises    UsageError if `out` is no folder or `device` cannot be used, SourceError if its records or the source cannot be read
    """
    out = Path(out)
    check_device(device)
    if not out.is_dir():
        raise UsageError("is not a folder", where=str(out), todo="name the folder of a checkpoint")
    opened = open_source(source) if isinstance(source, str | Path) else source
    try:
        body = examine(out, source=opened, plan=plan, generate=generate, device=device)
    finally:
        if opened is not None and opened is not source:
            opened.close()
    if body["stock"].get("answers"):
        asked = {key: body["stock"][key] for key in ("auto_class", "device", "answers")}
        write_record(out, "generate", {"weights_digest": body["weights_digest"], **asked})
    path = write_record(out, "verify", body)
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def examine(
    out: Path, *, source: Source | None = None, plan: Plan | None = None, generate: bool = True, device: str = "cpu"
) -> dict[str, Any]:
    """Make every check and return the body of the verify record; writes nothing. Parameters as in `verify`."""
    started = time.perf_counter()
    record = read_record(out, "quantize")
    plan = plan or _recorded_plan(out)
    body: dict[str, Any] = {"tensors": [], "loaders": {}, "stock": {}, "weights_digest": None}
    checks, tensors = check_structure(out)
    reason = "the files cannot be read safely"
    if tensors is not None:
        try:
            reader = SafetensorsSource(out)
        except HalfbyteError as error:
            checks.append(verdict("F23", [Fault(error.what, error.where or "config.json")], ""))
            reason = "config.json cannot be read"
        else:
            reason = "left out on request"
            try:
                checks += _check_contents(reader, source, plan, record, body, device)
                checks += _check_stock(reader, plan, device, body) if generate else []
            finally:
                reader.close()
    body["checks"] = [check.to_dict() for check in _complete(checks, reason)]
    body["passed"] = all(check["status"] != "failed" for check in body["checks"])
    body["with_source"] = source.label if source else None
    body["seconds"] = round(time.perf_counter() - started, 3)
    return body


def _recorded_plan(out: Path) -> Plan | None:
    body = read_record(out, "plan")
    if body is None:
        return None
    try:
        return Plan.from_dict(body)
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"plan record lacks a field ({error})", where=str(out / "halfbyte" / "plan.json"), todo="quantize again"
        ) from None


def _check_contents(
    reader: SafetensorsSource,
    source: Source | None,
    plan: Plan | None,
    record: dict[str, Any] | None,
    body: dict[str, Any],
    device: str,
) -> list[Check]:
    """Everything that reads weights or configuration; fills `tensors`, `loaders` and `weights_digest` of the body."""
    checks, weights = check_layout(reader)
    checks += check_inventory(reader, weights, originals_of(plan, source), plan)
    checks += check_kept(reader, source, record.get("tensors") if record and not source else None)
    if record is not None and record.get("method"):
        codes, body["tensors"] = check_fitted(reader, weights, source, record, device)
    else:
        codes, body["tensors"] = check_codes(reader, weights, source, exact=record is not None)
    files = sorted({info.file for info in reader.tensors})
    digests, found = check_digests(reader.path, files, record)
    body["weights_digest"] = digest(found)
    with track("config and loaders", 1, "steps") as advance:
        matrix, body["loaders"] = check_loaders(reader)
        advance(1)
    return [
        *checks,
        codes,
        *check_config(reader, source),
        check_companions(reader.path, source, record),
        digests,
        matrix,
    ]


def _check_stock(reader: SafetensorsSource, plan: Plan | None, device: str, body: dict[str, Any]) -> list[Check]:
    with track("stock transformers", 1, "steps") as advance:
        packed = nf4_names(info.name for info in reader.tensors)
        checks, body["stock"] = check_stock(reader.path, packed, plan, device)
        advance(1)
    return checks


def _complete(checks: Sequence[Check], reason: str) -> list[Check]:
    """All checks of TITLES in their order; one that was not made is skipped for `reason`."""
    made = {check.id: check for check in checks}
    assert len(made) == len(checks), "a check was made twice"
    assert made.keys() <= TITLES.keys(), "a check without a title"
    return [made.get(key) or skipped(key, reason) for key in TITLES]
