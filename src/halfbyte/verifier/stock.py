"""The real thing: stock transformers loads the folder and answers, and what it reports is judged here.

Everything else in this room reads bytes; only this shows that a stranger's `from_pretrained` gets a model that works. The
child process and what it looks at are in `stock_probe`; this side starts it, waits, and turns its report into checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.recipe.decisions import AREAS, Plan
from halfbyte.verifier.checks import Check, Fault, skipped, verdict

CHECKS = ("load", "modules", "values", "answers")
#: a 31B model on a CPU needs about three minutes a token; beyond this somebody should look
TIMEOUT_SECONDS = 4 * 3600


def check_stock(folder: Path, packed: set[str], plan: Plan | None, device: str) -> tuple[list[Check], dict[str, Any]]:
    """Checks `load`, `modules`, `values` and `answers`, and the child's report.

    packed  names of the weights stored as NF4: how many layers must become 4-bit, and which if there is a plan
    """
    report = run_probe(folder, device)
    return judge(report, packed, plan), report


def judge(report: Mapping[str, Any], packed: set[str], plan: Plan | None) -> list[Check]:
    """The four checks that a child's report amounts to."""
    if "error" in report:
        failed = verdict("load", [Fault(report["error"], "from_pretrained")], "")
        return [failed, *(skipped(name, "it did not load") for name in CHECKS[1:])]
    return [_load(report), _modules(report, packed, plan), _values(report), _answers(report)]


def run_probe(folder: Path, device: str) -> dict[str, Any]:
    """The child's report; {"error": sentence} if it crashed, hung or could not load."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as scratch:
        answer = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "halfbyte.verifier.stock_probe", str(folder.resolve()), device, str(answer)]
        try:
            # stderr is kept for the case of a crash only: bitsandbytes and transformers talk a lot while all is well
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                cwd=scratch,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result after {TIMEOUT_SECONDS // 3600} hours"}
        if answer.is_file():
            report: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return report
    last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
    return {"error": f"the loading process {how}: {last[0][:300]}"}


def _load(report: Mapping[str, Any]) -> Check:
    words = {
        "missing_keys": "has no tensor in the files and was filled with initial values",
        "unexpected_keys": "is in the files and was left out",
        "mismatched_keys": "has another shape than the model's",
    }
    faults = [Fault(what, name) for key, what in words.items() for name in report[key]]
    good = f"{report['auto_class']} made {report['architecture']} in {report['load_seconds']} s on {report['device']}"
    return verdict("load", faults, good)


def _modules(report: Mapping[str, Any], packed: set[str], plan: Plan | None) -> Check:
    made = set(report["linear4bit"])
    faults = [Fault("is 4-bit and has no quant state", name) for name in report["without_quant_state"]]
    if plan is None:
        if len(made) != len(packed):
            faults.append(Fault(f"{len(made)} Linear4bit, the files hold {len(packed)} quantized weights", "model"))
        return verdict("modules", faults, f"{len(made)} Linear4bit with a quant state")
    areas = {d.module: d.area for d in plan.decisions if d.action == "nf4" and d.module is not None}
    faults += [Fault("became Linear4bit, the plan keeps it", name) for name in sorted(made - areas.keys())]
    missing = sorted(areas.keys() - made - set(report["without_quant_state"]))
    faults += [Fault("is planned as nf4 and is no Linear4bit", name) for name in missing]
    counts = Counter(areas.get(name, "other") for name in made)
    tally = ", ".join(f"{area} {counts[area]}" for area in AREAS if counts[area])
    return verdict("modules", faults, f"{len(made)} Linear4bit with a quant state: {tally or 'none'}")


def _values(report: Mapping[str, Any]) -> Check:
    faults = [Fault("differs in the loaded model", name) for name in report["values_different"]]
    rest = len(report["values_unmatched"])
    good = f"{report['values_compared']} parameters and buffers equal the file"
    if rest:
        good += f"; {rest} are rebuilt while loading and were not compared, first {report['values_unmatched'][0]}"
    if not report["values_compared"] and not faults:
        return skipped("values", "no tensor of the file is found in the model by name")
    return verdict("values", faults, good)


def _answers(report: Mapping[str, Any]) -> Check:
    faults = [Fault(report["answers_error"], "tokenizer or processor")] if report["answers_error"] else []
    for answer in report["answers"]:
        if not answer["finite"]:
            faults.append(Fault("logits are not finite", answer["prompt"]))
        elif not answer["answer"]:
            faults.append(Fault("the answer is empty", answer["prompt"]))
    speed = ", ".join(f"{a['tokens']} tokens at {a['tokens_per_second']}/s" for a in report["answers"])
    return verdict("answers", faults, f"{len(report['answers'])} prompts: {speed}")
