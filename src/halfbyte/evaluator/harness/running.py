"""lm-eval on a model that wears any candidate's weights: the same arithmetic for both, as everywhere in this room.

lm-eval could load the two checkpoints itself; then one would run in bf16 and the other through bitsandbytes' kernels, and a difference
would be made of both. So it is handed our model, twice, with other weights; and GGUF files or `SRC@nf4` work too.

lm-eval is an extra: `pip install 'halfbyte[lm-eval]'`. It fetches a task's data from the hub, unless the task is a YAML file of your own
(`include`) that names a file on this disk. A YAML file may call Python functions beside it: lm-eval runs them, so include only what
you trust. Tasks that execute a model's code are refused by lm-eval; `halfbyte evaluate --task mbpp=FILE` has a sandbox.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError, UsageError
from halfbyte.evaluator.answering import Answerer
from halfbyte.evaluator.harness.pairing import slimmed
from halfbyte.layers.model import exact_float32
from halfbyte.layers.weights import Weights
from halfbyte.progress import note
from halfbyte.records import write_text_atomic

if TYPE_CHECKING:
    from halfbyte.evaluator.harness.job import HarnessSettings


def need_lm_eval() -> str:
    """lm-eval's version; raises UsageError if the extra is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed", where="lm-eval", todo="pip install 'halfbyte[lm-eval]'")
    from importlib.metadata import version

    return version("lm-eval")


def run_tasks(
    answerer: Answerer, weights: Weights, tasks: Sequence[str], settings: HarnessSettings, folder: Path
) -> dict[str, Any]:
    """Run `tasks` with `weights` on; samples go to `folder`/TASK.jsonl. Returns task -> {"version", "n_shot", "samples": path}.

    raises  SourceError with lm-eval's own words if it fails (no such task, data that cannot be fetched)
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answerer.wear(weights)
    note(f"lm-eval: {', '.join(tasks)} with the weights of {weights.label}")
    tokenizer = getattr(answerer.processor, "tokenizer", answerer.processor)
    chat = settings.chat and bool(getattr(tokenizer, "chat_template", None))
    try:
        wrapped = HFLM(pretrained=answerer.model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch)
        manager = TaskManager(include_path=settings.include)
        with exact_float32():
            found = simple_evaluate(
                wrapped, tasks=list(tasks), num_fewshot=settings.num_fewshot, limit=settings.limit, task_manager=manager,
                apply_chat_template=chat, log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
    except Exception as error:  # whatever a task's author or a hub can make of it
        raise SourceError(
            f"lm-eval stopped: {type(error).__name__}: {error}",
            where=", ".join(tasks),
            todo="lm-eval ls tasks names them; data comes from the hub",
        ) from error
    written = {}
    for task, samples in (found or {}).get("samples", {}).items():
        path = folder / f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in task)}.jsonl"
        lines = [json.dumps(dict(slimmed(sample)), default=str) for sample in samples]
        write_text_atomic(path, "\n".join(lines) + "\n")
        written[task] = {
            "samples": path,
            "version": _of(found, "versions", task),
            "n_shot": _of(found, "n-shot", task),
            "chat": chat,
        }
    return written


def _of(found: Mapping[str, Any], name: str, task: str) -> Any:
    value = found.get(name, {}).get(task)
    return value if isinstance(value, int | float | str) else None
