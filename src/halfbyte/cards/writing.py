"""`halfbyte card`: records -> README.md.

    gather (records held against each other) -> take_inventory (bytes balanced) -> sections -> template -> atomic write

The same records give the same card, byte for byte: no clock, no machine name, no order of a file system. A record that is
missing takes its section with it; a figure that is missing prints "not measured". Nothing is ever filled in.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.cards import front_matter, markdown, origin, proof, sections
from halfbyte.cards.evidence import Evidence, gather
from halfbyte.cards.inventory import Inventory, take_inventory
from halfbyte.cards.method import method_words
from halfbyte.cards.usage import AUTO_CLASSES, usage_snippet
from halfbyte.errors import UsageError
from halfbyte.recipe.decisions import bitsandbytes_for
from halfbyte.records import write_text_atomic

CARD = "README.md"


def card(out: str | Path, *, base_model: str | None = None, license: str | None = None) -> Path:
    """Write the model card of the checkpoint in `out` and return its path, OUT/README.md.

    base_model  hub id of the source, where the record's label is not one (a local folder)
    license     licence identifier, where the source states none

    raises UsageError (arguments), SourceError (no quantize record, a record of other weights, an account that does not
           balance), CheckFailed (verify found other weights than were recorded)
    """
    folder = Path(out)
    if not folder.is_dir():
        raise UsageError("is not a folder", where=str(folder), todo="name the folder of a checkpoint")
    path = folder / CARD
    write_text_atomic(path, render(gather(folder), base_model=base_model, license=license))
    return path


def render(evidence: Evidence, *, base_model: str | None = None, license: str | None = None) -> str:
    """The card as text; see `card`."""
    plan = evidence.plan or {}
    source = evidence.quantize["source"]
    base = front_matter.base_model_of(source["label"], base_model)
    licence = front_matter.license_of(source.get("lineage") or {}, license)
    auto_class = plan.get("model", {}).get("auto_class")
    name = evidence.folder.resolve().name
    task = front_matter.PIPELINE_TAGS.get(auto_class)
    data = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": front_matter.tags_of(base or source["label"]),
        "language": _languages(source.get("lineage") or {}),
        **licence,
    }
    results = front_matter.eval_results(evidence.evaluations.values(), task or "text-generation")
    values = {
        **_made(evidence, take_inventory(evidence.folder, evidence.quantize, evidence.plan)),
        **_proven(evidence, auto_class, name),
        "title": name,
        "base_model": base,
        "source_name": markdown.code(base or origin.shown_source(source["label"])),
        "source_kind": source["kind"],
        "licence": origin.licence_words(source.get("lineage") or {}, licence, license),
        "licence_files": origin.licence_files(evidence),
        "left_behind": origin.left_behind(evidence),
    }
    body: str = _template().render(values)
    return front_matter.front_matter(data, results, name) + "\n" + body


def _made(evidence: Evidence, inventory: Inventory) -> dict[str, Any]:
    """Values of the sections on what was made."""
    plan, sizes = evidence.plan, evidence.quantize["sizes"]
    summary = (plan or {}).get("summary", {})
    modules = summary.get("modules", {})
    return {
        "sizes": {
            "source": markdown.gigabytes(sizes.get("source_bytes")),
            "files": markdown.gigabytes(inventory.file_bytes),
            "bits": markdown.decimal(sizes.get("bits_per_weight")),
            "parameters": markdown.count(sizes.get("parameters")),
        },
        "four_bit": f"{modules['nf4']} of {modules['linear']}" if modules else None,
        "area_table": sections.area_table(inventory, plan) if plan else None,
        "balance": sections.balance(inventory, plan or {}),
        "preset": (plan or {}).get("preset"),
        "sizes_table": sections.sizes_table(evidence, inventory),
        "assumptions": summary.get("assumptions"),
        "notes": (plan or {}).get("notes", []),
        "skip_list": sections.skip_list(plan) if plan else None,
        "loader_table": sections.loader_table(plan) if plan else None,
        "method": method_words(evidence.quantize),
        "fitted": bool(evidence.quantize.get("method")),
        "blocksize": " or ".join(map(str, sections.blocksizes(plan))),
        "bitsandbytes": bitsandbytes_for(sections.blocksizes(plan)),
        "budget": sections.budget(plan),
    }


def _proven(evidence: Evidence, auto_class: str | None, name: str) -> dict[str, Any]:
    """Values of the sections on what is known of it, how to use it and how to make it again."""
    areas = {decision["area"] for decision in (evidence.plan or {}).get("decisions", [])}
    has_images = "vision" in areas and auto_class == "AutoModelForImageTextToText"
    return {
        "verdict": proof.verdict(evidence),
        "check_table": proof.check_table(evidence.verify) if evidence.verify else None,
        "error_table": proof.error_table(evidence),
        "lattice": origin.lattice_words(evidence),
        "fidelity_table": proof.fidelity_table(evidence),
        "answers": proof.answers(evidence),
        "answer_setting": proof.answer_setting(evidence),
        "not_measured": proof.not_measured(evidence, has_images=has_images),
        "has_images": has_images,
        "snippet": usage_snippet(auto_class, has_images, name) if auto_class in AUTO_CLASSES else None,
        "generate_command": shlex.join(["halfbyte", "generate", name, "--prompt", "Name three primary colors."]),
        "commands": origin.commands(evidence, name),
        "run_facts": origin.run_facts(evidence),
        "versions": origin.version_list(evidence),
        "digest_table": origin.digest_table(evidence),
        "file_table": origin.file_table(evidence),
    }


def _languages(lineage: Mapping[str, Any]) -> list[str] | None:
    """Language codes that the source states, None if it states none or something else."""
    stated = lineage.get("language")
    words = [stated] if isinstance(stated, str) else stated
    return words if isinstance(words, list) and words and all(isinstance(w, str) for w in words) else None


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("halfbyte.cards", "templates"),
        # finalize escapes Markdown, which HTML autoescape does not (see halfbyte.cards.markdown)
        autoescape=False,
        finalize=markdown.finish,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": markdown.code, "fence": markdown.fence}
    return environment.get_template("card.md.j2")
