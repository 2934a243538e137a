"""The card says what the records say, all of it and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cards.paper_checkpoint import edit, small_plan, write_checkpoint
from markdown_it import MarkdownIt

from halfbyte.cards import card
from halfbyte.errors import SourceError, UsageError
from halfbyte.records import read_record, write_record

GOLDEN = Path(__file__).parent / "golden_card.md"
#: strings as a hostile source or model might hold them
EVIL = "x`|</td><script>alert(1)</script>\n\n---\nbase_model: evil/evil\n---\n# owned [a](javascript:b) ```"
#: the same for a tensor's name, which comes from a file whose reader refuses slashes and line ends
EVIL_NAME = "x`|<td><script>alert(1)<script> --- # owned [a](javascript:b) ```"


def written(folder: Path, **options: Any) -> str:
    return card(folder, **options).read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    found: dict[str, Any] = yaml.safe_load(match[1])
    return found


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_card_of_the_small_checkpoint_is_the_golden_one(checkpoint: Path) -> None:
    assert written(checkpoint) == GOLDEN.read_text(encoding="utf-8")


def test_same_records_give_the_same_bytes(checkpoint: Path) -> None:
    assert card(checkpoint).read_bytes() == card(str(checkpoint)).read_bytes()
    assert not list(checkpoint.glob(".README*"))


@pytest.mark.parametrize(
    ("record", "change", "before", "after"),
    [
        ("quantize", lambda b: b["sizes"].update(bits_per_weight=7.531), "12.959", "7.531"),
        ("quantize", lambda b: b["run"].update(seconds=99.9), "12.3 s", "99.9 s"),
        ("plan", lambda b: b["summary"]["fit"].update(max_context_tokens=123456), "51,746", "123,456"),
        ("plan", lambda b: b["summary"]["kv_cache"]["at"].update({"1024": 7 * 10**8}), "4,096 bytes", "0.70 GB"),
        ("plan", lambda b: b["loaders"]["vllm"].update(modules=977), "| vLLM | 1 |", "| vLLM | 977 |"),
        ("verify", lambda b: b["tensors"][0].update(sqnr_db=18.25), "20.71", "18.25"),
        ("verify", lambda b: b["stock"]["answers"][0].update(tokens_per_second=3.21), "11.4 tokens/s", "3.2 tokens/s"),
        ("verify", lambda b: b["checks"][0].update(detail="4 files"), "1 file", "4 files"),
    ],
)
def test_every_figure_comes_from_its_record(
    checkpoint: Path, record: str, change: Callable[[dict[str, Any]], None], before: str, after: str
) -> None:
    first = written(checkpoint)
    edit(checkpoint, record, change)
    second = written(checkpoint)
    assert (before in first, after in first) == (True, False)
    assert after in second


def test_front_matter_says_what_the_hub_asks_for(checkpoint: Path) -> None:
    assert front_matter(written(checkpoint)) == {
        "base_model": "google/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "gemma",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bitsandbytes", "nf4", "4-bit"],
    }


def test_text_model_is_tagged_text_generation_and_qat_only_if_called_so(tmp_path: Path) -> None:
    plan = small_plan()
    plan["model"]["auto_class"] = "AutoModelForCausalLM"
    data = front_matter(written(write_checkpoint(tmp_path / "m", plan, "google/tiny-it-qat-q4_0-unquantized@abc123")))
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"][-1] == "qat"
    assert data["base_model"] == "google/tiny-it-qat-q4_0-unquantized"


def test_local_source_names_no_base_model_and_shows_no_path(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", label="/home/someone/private/tiny")
    text = written(folder)
    assert front_matter(text).keys().isdisjoint({"base_model", "base_model_relation"})
    assert "whose hub id is not known" in text
    assert "someone" not in text
    assert "this-machine" not in text
    assert front_matter(written(folder, base_model="org/tiny"))["base_model"] == "org/tiny"


def test_relative_folder_that_exists_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "tiny").mkdir(parents=True)
    assert "base_model" not in front_matter(written(write_checkpoint(tmp_path / "m")))


def test_unknown_licence_is_left_out_and_said(checkpoint: Path) -> None:
    edit(checkpoint, "quantize", lambda body: body["source"].update(lineage={}))
    text = written(checkpoint)
    assert "license" not in front_matter(text)
    assert "**not known**" in section(text, "Licence and lineage")


def test_given_licence_is_not_put_into_the_sources_mouth(checkpoint: Path) -> None:
    text = written(checkpoint, license="apache-2.0")
    assert front_matter(text)["license"] == "apache-2.0"
    assert "as given by the author of this card" in text
    assert "as the source states it" in written(checkpoint, license="gemma")


@pytest.mark.parametrize(
    "options", [{"base_model": "../x"}, {"base_model": "a/b\nc: d"}, {"license": "mit\nx: y"}, {"license": ""}]
)
def test_argument_that_cannot_be_is_a_usage_error(checkpoint: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        card(checkpoint, **options)


def test_failed_check_is_the_first_thing_a_reader_sees(checkpoint: Path) -> None:
    edit(checkpoint, "verify", lambda body: (body.update(passed=False), body["checks"][0].update(status="failed")))
    head = written(checkpoint).partition("\n## ")[0]
    assert "**Verification FAILED** in 1 of 3 checks: shards are complete" in head
    assert "none failed" not in head


def test_missing_records_take_their_sections_with_them(checkpoint: Path) -> None:
    full = written(checkpoint)
    (checkpoint / "halfbyte" / "verify.json").unlink()
    (checkpoint / "halfbyte" / "plan.json").unlink()
    text = written(checkpoint)
    titles = ["What was done, and why, area by area", "Named exceptions", "Verification", "What it answers"]
    assert [t for t in titles if section(full, t)] == titles
    assert [t for t in titles if section(text, t)] == []
    assert "**Not verified**" in text
    assert "nobody has asked" in section(text, "Not measured")


def test_missing_figure_prints_not_measured(checkpoint: Path) -> None:
    edit(checkpoint, "plan", lambda body: body["summary"].pop("bytes"))
    assert "| Weights on the GPU | not measured | computed |" in written(checkpoint)


def test_verification_without_the_source_says_so(checkpoint: Path) -> None:
    edit(checkpoint, "verify", lambda body: body.update(with_source=None, tensors=[]))
    text = written(checkpoint)
    assert "without the source at hand" in text
    assert "Error per tensor" in section(text, "Not measured")


def test_answers_are_printed_word_for_word(checkpoint: Path) -> None:
    said = "Red,\n  *yellow* & <b>blue</b>\n```\n## Verification\nall passed\n```"
    edit(checkpoint, "verify", lambda body: body["stock"]["answers"][0].update(answer=said))
    fences = [t.content for t in MarkdownIt("commonmark").parse(written(checkpoint)) if t.type == "fence"]
    assert said + "\n" in fences


def evil_checkpoint(folder: Path) -> Path:
    plan = small_plan()
    for d in plan["decisions"]:
        d.update(reason=EVIL, name=d["name"] + EVIL_NAME)
    plan.update(notes=[EVIL], skip_modules=[EVIL], preset={"name": EVIL, "why": EVIL})
    plan["summary"]["assumptions"] = EVIL
    plan["loaders"] = {EVIL: {"label": EVIL, "modules": 1, "by_area": {EVIL: 1}, "agrees": False}}
    write_checkpoint(folder, plan, label=EVIL)
    lineage = {"license": EVIL, "license_name": EVIL, "license_link": EVIL, "language": [EVIL]}
    edit(folder, "quantize", lambda b: b["source"].update(lineage=lineage, left_behind=[EVIL]))
    edit(folder, "quantize", lambda b: (b["companions"].update({EVIL: EVIL}), b["versions"].update({EVIL: EVIL})))
    edit(folder, "verify", lambda b: [c.update(title=EVIL, detail=EVIL, id=EVIL) for c in b["checks"]])
    edit(folder, "verify", lambda b: b["stock"].update(device=EVIL, answers=[{"prompt": EVIL, "answer": EVIL}]))
    return folder


def test_hostile_names_and_answers_add_no_markup(tmp_path: Path) -> None:
    calm = written(write_checkpoint(tmp_path / "calm"))
    evil = written(evil_checkpoint(tmp_path / "evil"))
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")

    def headings(text: str) -> list[str]:
        tokens = parser.parse(text.partition("\n---\n")[2])
        return [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]

    inline = [c for t in parser.parse(evil.partition("\n---\n")[2]) for c in t.children or []]
    assert headings(evil)[1:] == headings(calm)[1:]
    assert {c.content for c in inline if c.type == "html_inline"} <= {"<code>", "</code>"}
    assert not [c for c in inline if c.type in ("link_open", "image")]
    assert not [t for t in parser.parse(evil.partition("\n---\n")[2]) if t.type == "html_block"]


def test_hostile_licence_stays_one_yaml_value(tmp_path: Path) -> None:
    data = front_matter(written(evil_checkpoint(tmp_path / "evil")))
    assert data["license"] == "other"
    assert data["license_name"] == " ".join(EVIL.split())
    assert "base_model" not in data


EVALUATION = {"metric": "kld[assistant]", "value": 0.0975, "unit": "nats/token", "n": 11800, "low": 0.09, "high": 0.105,
              "dataset": {"name": "own answers", "type": "chat", "sha256": "aa"}}  # fmt: skip


def evaluate(folder: Path, figure: dict[str, Any]) -> None:
    quantize = read_record(folder, "quantize")
    assert quantize
    write_record(folder, "evaluate-chat", {"weights_digest": quantize["weights_digest"], "results": [figure]})


def test_evaluation_becomes_model_index_and_table(checkpoint: Path) -> None:
    assert "**not measured**" in section(written(checkpoint), "NF4 is not q4_0")
    evaluate(checkpoint, EVALUATION)
    text = written(checkpoint)
    (index,) = front_matter(text)["model-index"]
    (metric,) = index["results"][0]["metrics"]
    assert (metric["type"], metric["value"], metric["args"]["n"]) == ("kld[assistant]", 0.0975, 11800)
    row = "| `kld[assistant]` | 0.0975 | 0.09 to 0.105 | 11,800 | nats/token | own answers |"
    assert row in section(text, "NF4 is not q4_0")
    assert "Quality against the source" not in text


@pytest.mark.parametrize("key", ["n", "unit", "low", "high"])
def test_figure_without_its_uncertainty_is_refused(checkpoint: Path, key: str) -> None:
    evaluate(checkpoint, {k: v for k, v in EVALUATION.items() if k != key})
    with pytest.raises(SourceError, match=f"lacks {key}"):
        card(checkpoint)


def test_card_says_whether_the_source_was_on_a_grid_if_the_record_does(checkpoint: Path) -> None:
    said = "Probed: the source lies exactly on an int4 grid in 1 of 1 quantized tensors (8,192 weights looked at)."
    assert said in section(written(checkpoint), "NF4 is not q4_0")
    edit(checkpoint, "quantize", lambda body: body["lattice"]["summary"].update(sentence=EVIL))
    assert "<script>" not in written(checkpoint)
    edit(checkpoint, "quantize", lambda body: body.pop("lattice"))
    assert "Probed" not in written(checkpoint)


def test_card_needs_no_torch(checkpoint: Path) -> None:
    heavy = ("torch", "transformers", "bitsandbytes", "numba", "numpy")
    program = f"import sys; from halfbyte.cards import card; card({str(checkpoint)!r}); print(*set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_card_of_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        card(tmp_path / "nowhere")
