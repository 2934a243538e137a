"""Where it comes from and how to make it again: source, licence, command line, versions, hashes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.cards.evidence import Evidence
from halfbyte.cards.markdown import Markdown, code, count, decimal, fence, gigabytes, joined, table, text
from halfbyte.records import digest

_LICENCE_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING", "TERMS")


def shown_source(label: str) -> str:
    """How the card calls the source: a hub id as it is, of a path its last part (the rest is nobody's business)."""
    label = " ".join(label.split())
    return Path(label).name or label if label.startswith(("/", ".", "~")) else label


def commands(evidence: Evidence, target: str) -> Markdown:
    """The command lines that make and prove this checkpoint again, as one shell block."""
    source, preset = (
        shown_source(evidence.quantize["source"]["label"]),
        (evidence.plan or {}).get("preset", {}).get("name"),
    )
    version = evidence.quantize.get("versions", {}).get("halfbyte")
    options = ["--preset", str(preset)] if preset else []
    options += _method_options(evidence.quantize.get("method"))
    blocks, spent = (evidence.plan or {}).get("blocksize", 64), (evidence.plan or {}).get("budget")
    options += ["--blocksize", str(blocks)] if blocks != 64 else []
    options += ["--budget", spent["asked"], "--sensitivity", "sensitivity.json"] if spent else []
    lines = [
        ["pip", "install", f"halfbyte=={version}" if version else "halfbyte"],
        ["halfbyte", "quantize", source, target, *options],
        ["halfbyte", "verify", target, "--source", source],
    ]
    return fence("\n".join(shlex.join(line) for line in lines), "sh")


def _method_options(method: Mapping[str, Any] | None) -> list[str]:
    """The options that ask for this method again; of a calibration file its name."""
    if not method:
        return []
    words = ["--method", str(method["name"])]
    calibration = method.get("calibration")
    if calibration:
        words += ["--calibration", str(calibration["name"])]
        for key in ("calibration_tokens", "max_new_tokens", "dtype", "batch", "seed"):
            words += [f"--{key.replace('_', '-')}", str(method[key])]
        words += [] if method["sequential"] else ["--no-sequential"]
    for key, value in method.get("fit", {}).items():
        words += ["--fit", f"{key}={str(value).lower()}"]
    return words


def run_facts(evidence: Evidence) -> Markdown | None:
    """Where quantize ran and what it took; None if the record does not say."""
    run = evidence.quantize.get("run", {})
    parts: list[Any] = []
    if run.get("seconds") is not None:
        parts.append(f"{decimal(run['seconds'], 1)} s on {run.get('device')} ({run.get('cores')} CPU cores)")
    if run.get("peak_rss_bytes") is not None:
        parts.append(f"peak memory {gigabytes(run['peak_rss_bytes'])}")
    if run.get("peak_gpu_bytes") is not None:
        parts.append(f"peak GPU memory {gigabytes(run['peak_gpu_bytes'])}")
    if run.get("resumed_tensors"):
        parts.append(f"continued after an interruption ({count(run['resumed_tensors'])} tensors were already there)")
    return joined(parts) if parts else None


def version_list(evidence: Evidence) -> Markdown:
    """Versions that the quantize record was made with; the machine's name and kernel stay in the record."""
    known = evidence.quantize.get("versions", {})
    return joined([text(f"{name} {number}") for name, number in known.items() if name != "platform"])


def digest_table(evidence: Evidence) -> Markdown:
    """The digests that tie source, plan and weights together."""
    quantize = evidence.quantize
    source = digest({name: entry["sha256"] for name, entry in quantize["tensors"].items()})
    rows = [
        ("plan", code(quantize["plan_digest"])),
        (f"source tensors ({count(len(quantize['tensors']))}, each by its sha256)", code(source)),
        ("weight files", code(quantize["weights_digest"])),
    ]
    return table(["Digest of", ""], rows)


def file_table(evidence: Evidence) -> Markdown:
    """sha256 of every file that was written or carried over, and of the source's files if they are recorded."""
    rows: list[tuple[Any, ...]] = []
    for name, entry in (evidence.quantize["source"].get("files") or {}).items():
        rows.append((joined([Markdown("source: "), code(name)], ""), count(entry.get("bytes")), code(entry["sha256"])))
    for name, entry in evidence.quantize["files"].items():
        rows.append((code(name), count(entry["bytes"]), code(entry["sha256"])))
    for name, sha256 in evidence.quantize.get("companions", {}).items():
        path = evidence.folder / name
        # a companion's size is not recorded: it is read, where the file still lies beside the card
        rows.append((code(name), count(path.stat().st_size) if path.is_file() else Markdown("gone"), code(sha256)))
    return table(["File", "Bytes:", "sha256"], rows)


def lattice_words(evidence: Evidence) -> Markdown | None:
    """Whether the source was on an int4 or NF4 grid already, and on how many weights that rests; None if not recorded."""
    found = evidence.quantize.get("lattice") or {}
    sentence, sampled = found.get("summary", {}).get("sentence"), count(found.get("sampled_weights"))
    if not sentence or not sampled:
        return None
    said = " ".join(str(sentence).split())
    return joined([Markdown("Probed: "), said, Markdown(f" ({sampled} weights looked at).")], "")


def licence_words(lineage: Mapping[str, Any], licence: Mapping[str, str], given: str | None) -> Markdown:
    """What is known of the licence, and who says so."""
    if not licence:
        return Markdown(
            "The source's licence is **not known** to whoever wrote this card: its metadata states none. A quantized copy is a "
            "derived work; find out before you use or share it."
        )
    who = (
        "as given by the author of this card"
        if given and given != lineage.get("license")
        else "as the source states it"
    )
    name = [code(licence["license_name"])] if "license_name" in licence else []
    link = [code(licence["license_link"])] if "license_link" in licence else []
    words = joined([Markdown("Licence: "), joined([code(licence["license"]), *name, *link]), Markdown(f", {who}.")], "")
    return Markdown(
        words + " Quantizing changes no licence: these weights are a derived work under the source's terms."
    )


def licence_files(evidence: Evidence) -> Markdown | None:
    """Licence files carried over byte for byte."""
    names = [name for name in evidence.quantize.get("companions", {}) if name.upper().startswith(_LICENCE_STEMS)]
    return joined([code(name) for name in names]) if names else None


def left_behind(evidence: Evidence) -> Markdown | None:
    """Files of the source that were not carried over."""
    names = evidence.quantize["source"].get("left_behind") or []
    return joined([code(name) for name in names]) if names else None
