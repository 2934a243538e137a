"""halfbyte: large Hugging Face models in 4-bit NF4, and what it cost, measured.

    plan       what would become of every tensor, and why        halfbyte.plan(source)
    quantize   write the NF4 checkpoint                           halfbyte.quantize(source, out)
    verify     prove it, tensor by tensor                         halfbyte.verify(out, source=source)
    generate   ask it something, through transformers             halfbyte.generate(out, "Name three primary colors.")
    evaluate   measure what it lost against its source            halfbyte.evaluate(source, [out])
    lm-eval    lm-eval's tasks on both, paired                    halfbyte.lm_eval(source, out, tasks="arc_easy")
    card       write its model card from the records              halfbyte.card(out)
    push       upload it                                          halfbyte.push(out, "org/name")
    qat        train a small model onto a 4-bit grid              halfbyte.qat(source, out, data="chats.jsonl")
    sensitivity  what each module costs in NF4, for --budget      halfbyte.sensitivity(source, out, data="text.txt")

Each is a command of the same name (`lm-eval` for `lm_eval`) with the same parameters. `halfbyte.load(out)` is none: it gives the model
itself, a transformers model with our 4-bit linears where they are faster. Importing this package imports nothing heavy: a name is
resolved when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.cards import card, push
    from halfbyte.errors import HalfbyteError
    from halfbyte.evaluator.harness import lm_eval
    from halfbyte.evaluator.job import evaluate
    from halfbyte.evaluator.sensitivity import sensitivity
    from halfbyte.quantizer.job import quantize
    from halfbyte.recipe.decisions import Decision, Plan
    from halfbyte.recipe.survey import plan
    from halfbyte.runtime.generate import generate
    from halfbyte.runtime.loading.checkpoint import load
    from halfbyte.trainer.qat import qat
    from halfbyte.verifier import verify

__all__ = [
    "Decision",
    "HalfbyteError",
    "Plan",
    "card",
    "evaluate",
    "generate",
    "lm_eval",
    "load",
    "plan",
    "push",
    "qat",
    "quantize",
    "sensitivity",
    "verify",
]

_HOME = {
    "Decision": "halfbyte.recipe.decisions",
    "HalfbyteError": "halfbyte.errors",
    "Plan": "halfbyte.recipe.decisions",
    "card": "halfbyte.cards",
    "evaluate": "halfbyte.evaluator.job",
    "generate": "halfbyte.runtime.generate",
    "lm_eval": "halfbyte.evaluator.harness",
    "load": "halfbyte.runtime.loading.checkpoint",
    "plan": "halfbyte.recipe.survey",
    "push": "halfbyte.cards",
    "qat": "halfbyte.trainer.qat",
    "quantize": "halfbyte.quantizer.job",
    "sensitivity": "halfbyte.evaluator.sensitivity",
    "verify": "halfbyte.verifier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
