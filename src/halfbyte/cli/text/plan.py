"""A plan as a person reads it: what becomes of each area, what it weighs, whether it fits, who reads the list how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from halfbyte.recipe.budget.spending import costs_method
from halfbyte.recipe.decisions import bitsandbytes_for, shared_reason
from halfbyte.recipe.linter import mark_of

GIB = 2**30
_SHOWN_REASONS = 3
_SHOWN_GROUPS = 24


def render(plan: dict[str, Any], *, with_tensors: bool = False) -> str:
    """Text of a plan record (`Plan.to_dict()`)."""
    sections = [_head(plan), _areas(plan), _sizes(plan), _loaders(plan)]
    if plan["notes"]:
        sections.append(["notes", *(f"  - {note}" for note in plan["notes"])])
    if plan.get("budget"):
        sections.append(_budget(plan["budget"]))
    if plan.get("lattice"):
        sections.append(_lattice(plan["lattice"]))
    if with_tensors:
        sections.append(["tensors", *_tensors(plan["decisions"])])
    return "\n\n".join("\n".join(section) for section in sections)


def _head(plan: dict[str, Any]) -> list[str]:
    model, modules = plan["model"], plan["summary"]["modules"]
    return [
        f"{model['architecture']} ({model['model_type']}), loaded by {model['auto_class']}",
        f"preset {plan['preset']['name']}: {plan['preset']['why']}",
        f"{modules['nf4']} of {modules['linear']} linear modules become Linear4bit (blocks of {_blocks(plan)})",
    ]


def _blocks(plan: dict[str, Any]) -> str:
    own = Counter(d.get("blocksize") or plan["blocksize"] for d in plan["decisions"] if d["action"] == "nf4")
    if len(own) < 2:
        return str(next(iter(own), plan["blocksize"]))
    return ", ".join(f"{size}: {count}" for size, count in sorted(own.items(), reverse=True))


def _budget(spent: dict[str, Any]) -> list[str]:
    """What was asked, what was chosen, and on what evidence; then what was bought, the best a byte first."""
    measured, joint = spent["sensitivity"], spent["sensitivity"]["joint"]["nf4-64"]
    lines = [
        f"budget      {spent['asked']}: at most {spent['at_most']:,} of {spent['bytes']:,} bytes are used "
        f"(from {spent['smallest']:,} to {spent['largest']:,} can be asked for)",
        "chosen      " + ", ".join(f"{count} {label}" for label, count in spent["tally"].items()),
        f"costs       {spent['nats']:.4f} nats, where NF4-64 everywhere is {spent['uniform']['nf4-64']:.4f} and NF4-32 "
        f"{spent['uniform']['nf4-32']:.4f}: sums of modules measured one at a time, with weights by {costs_method(spent)}",
        f"measured    {measured['n']:,} tokens of {measured['documents']} documents, {measured['protocol']}; all in NF4-64 at once: "
        f"{joint['kld']:.4f} nats, their sum {joint['sum']:.4f}",
    ]
    if spent["unmeasured"]:
        lines.append(f"unmeasured  {len(spent['unmeasured'])} modules stay as the preset has them")
    bought = []
    for group in spent["groups"]:
        if group["choice"] != "nf4-64":
            saved = group["nats"]["nf4-64"] - group["nats"][group["choice"]]
            price = group["bytes"][group["choice"]] - group["bytes"]["nf4-64"]
            said = f"  {group['choice']:7} {group['name']}: saves {saved:.2g} nats for {price / 1e6:.2f} MB"
            bought.append((-saved / price, said))
    lines += [said for _, said in sorted(bought)[:_SHOWN_GROUPS]]
    if len(bought) > _SHOWN_GROUPS:
        lines.append(f"  and {len(bought) - _SHOWN_GROUPS} more, less saved a byte (--tensors or --json lists all)")
    return lines


def _areas(plan: dict[str, Any]) -> list[str]:
    summary = plan["summary"]
    rows = [("area", "tensors", "linear", "NF4", "GiB before", "GiB after", "why")]
    for area, row in summary["areas"].items():
        modules = summary["modules"]["by_area"].get(area, {"linear": 0, "nf4": 0})
        reasons = Counter(shared_reason(d["reason"]) for d in plan["decisions"] if d["area"] == area)
        why = "; ".join(reason for reason, _ in reasons.most_common(_SHOWN_REASONS))
        rows.append(
            (
                area, str(row["tensors"]), str(modules["linear"]), str(modules["nf4"]),
                f"{row['source_bytes'] / GIB:.3f}", f"{row['output_bytes'] / GIB:.3f}", why,
            )
        )  # fmt: skip
    return list(_table(rows))


def _sizes(plan: dict[str, Any]) -> list[str]:
    summary = plan["summary"]
    size, cache, fit = summary["bytes"], summary["kv_cache"], summary["fit"]
    context = (
        f"fits a {fit['card_gb']:g} GB card with {fit['max_context_tokens']:,} tokens of context"
        if fit["fits"]
        else f"does not fit a {fit['card_gb']:g} GB card"
    )
    bits = summary["bits_per_weight_nf4"]
    return [
        f"source      {size['source'] / GIB:8.2f} GiB  ({size['source'] / 1e9:.2f} GB)",
        f"file        {size['file'] / GIB:8.2f} GiB  ({size['file'] / 1e9:.2f} GB), {summary['bits_per_weight']:.3f} bits a weight"
        + (f", {bits:.3f} in the NF4 tensors" if bits else ""),
        *_block_sizes(plan),
        f"on the GPU  {size['gpu'] / GIB:8.2f} GiB",
        f"KV cache    {cache['bytes_per_1k_tokens_growing'] / 2**20:8.1f} MiB per 1k tokens"
        f", and {cache['sliding_window_bytes_full'] / 2**20:.1f} MiB once the sliding windows are full",
        f"fit         {context}",
        f"assumed     {summary['assumptions']}",
    ]


def _block_sizes(plan: dict[str, Any]) -> Iterator[str]:
    """The file in blocks of 64 and of 32, and what the finer ones need."""
    found = plan["summary"].get("blocksizes", {})
    if "64" in found and "32" in found:
        yield "block size  " + "; ".join(
            f"{size}: {row['file'] / GIB:.3f} GiB, {row['bits_per_weight']:.3f} bits a weight"
            for size, row in found.items() if row["bits_per_weight"]
        )  # fmt: skip
    own = [d.get("blocksize") or plan["blocksize"] for d in plan["decisions"] if d["action"] == "nf4"]
    needed = bitsandbytes_for(own)
    if needed:
        yield f"needs       bitsandbytes {needed} or newer: blocks of 32 on CPU and CUDA"


def _loaders(plan: dict[str, Any]) -> list[str]:
    rows = [("loader", "Linear4bit", "by area", "")]
    for row in plan["loaders"].values():
        where = ", ".join(f"{count} {area}" for area, count in row["by_area"].items()) or "none"
        rows.append((row["label"], str(row["modules"]), where, mark_of(row, plan["loaders"])))
    counts = {row["modules"] for row in plan["loaders"].values()}
    verdict = (
        "every loader agrees"
        if all(r["agrees"] for r in plan["loaders"].values())
        else (
            f"loaders disagree ({' / '.join(str(c) for c in sorted(counts, reverse=True))}): quantize refuses to write this list"
        )
    )
    return ["llm_int8_skip_modules: " + ", ".join(plan["skip_modules"]), *_table(rows), verdict]


def _lattice(found: dict[str, Any]) -> list[str]:
    """The sentence, and one line for each kind of finding."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for tensor in found["tensors"]:
        unit = "rows" if tensor["blocksize"] == "row" else f"blocks of {tensor['blocksize']}"
        grid = f"{tensor['grid']}, {unit}, {tensor['scale_dtype']} scales" if tensor["grid"] else "no grid"
        rows.setdefault(f"{tensor['verdict']}: {grid}", []).append(tensor)
    lines = [f"lattice     {found['summary']['sentence']}", f"looked at   {found['sampled_weights']:,} weights"]
    for name, tensors in rows.items():
        exact = [t["exact_fraction"] for t in tensors if t["exact_fraction"] is not None]
        share = f", {100 * min(exact):.1f} to {100 * max(exact):.1f} % of blocks to the bit" if exact else ""
        lines.append(f"  {len(tensors)} {name}{share}")
    return lines


def _tensors(decisions: list[dict[str, Any]]) -> Iterator[str]:
    for d in decisions:
        shape = "x".join(map(str, d["shape"])) or "scalar"
        yield f"  {d['action']:4}  {d['name']}  {d['dtype']} {shape}  {d['reason']}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns padded to their widest cell; the last one as it comes."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
