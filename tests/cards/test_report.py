"""The HTML report of a real evaluation: its figures are the record's, strangers' text stays text, nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cards.small_schema import violations

import halfbyte
from halfbyte.cards.report import report, section
from halfbyte.cards.report.page import render
from halfbyte.errors import SourceError, UsageError

SCHEMA = Path(halfbyte.__file__).parent / "evaluator" / "job" / "evaluate.schema.json"
HOSTILE = "nf4 <b>$x_1$ & co|`"
PROMPT = "<script>alert(1)</script> | [x](http://evil.example) \u202e $a_b$"


@pytest.fixture(scope="module")
def out(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A candidate with a hostile name and another base's, on prompts that are markup."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("report")
    named = Path(shutil.copytree(tiny_gemma4, folder / HOSTILE))
    data = folder / "<i>chats.jsonl"
    lines = [{"id": f"<u>{n}", "prompt": f"{PROMPT} {n}"} for n in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    halfbyte.evaluate(
        tiny_gemma4, [str(tiny_gemma4), f"{named}@nf4", "_x:uniform"], base=[f"_x={tiny_gemma4}"], data=[data],
        protocol=["kld[assistant,on-policy]", "ppl[raw]"], out=folder / "out", device="cpu", max_new_tokens=6,
        resamples=200, limit=6,
    )  # fmt: skip
    yield folder / "out"
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((out / "halfbyte" / "evaluate.json").read_text())
    return body


@pytest.fixture(scope="module")
def page(out: Path) -> str:
    return report(out).read_text(encoding="utf-8")


class Seen(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_nothing_is_fetched(page: str) -> None:
    seen = Seen(page)
    links = [value for name, value in seen.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert links, "the drawings refer to their own parts"
    assert all(link.startswith("#") for link in links)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(seen.tags)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert not re.search(r"<!ENTITY|<\?xml", page)


def test_every_figure_of_the_record_is_on_the_page(page: str, record: dict[str, Any]) -> None:
    text = " ".join(Seen(page).texts)
    count = 0
    for block in record["protocols"]:
        assert f"{block['rows']['n']:,} tokens of {block['rows']['documents']} documents" in text
        for candidate in block["candidates"]:
            for figure in candidate["figures"]:
                assert printed(figure["value"]) in text, figure
                if figure["low"] is not None:
                    low, high = figure["low"], figure["high"]
                    assert (
                        f"{printed(figure['value'])} [{printed(low)}, {'∞' if high is None else printed(high)}]" in text
                    )
                count += 1
            assert printed(candidate["kld_max"]) in text
            assert all(printed(token["kld"]) in text for token in candidate["worst"] if candidate["kld_max"])
        assert block["rows"]["digest"] in text
    assert count == 6 * 10, "three candidates, two protocols"
    for base in record["bases"]:
        assert all(
            f"{each['size']['file_bytes']:,}" in text for each in base["candidates"] if each["size"]["file_bytes"]
        )
    assert all(each["digest"] in text for base in record["bases"] for each in base["candidates"])


def printed(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def test_sections_are_in_the_order_of_a_sceptic(page: str) -> None:
    titles = re.findall(r"<h2>(\d) (.*?)</h2>", page)
    assert [int(number) for number, _ in titles] == list(range(1, 10))
    assert [title for _, title in titles][:3] == ["Verdict", "Base and precision", "Sizes"]


def test_missing_cells_are_printed(page: str, record: dict[str, Any]) -> None:
    text = " ".join(Seen(page).texts)
    assert re.search(r"5 Tasks\s+not measured", text)
    assert {e["effect"] for e in record["effects"]} == set(), "no kind is in both bases"
    assert re.search(r"D\(vanilla\)\s+not measured", text)
    assert re.search(r"T\s+not measured", text)
    assert "a second base" not in text


def test_effects_are_printed_and_drawn(record: dict[str, Any], out: Path) -> None:
    common = {
        "protocol": "kld[assistant,on-policy]", "metric": "kld mean", "precision": "NF4", "verdict": "undecided",
        "bases": {"vanilla": "reference", "QAT": "<b>qat"},
    }  # fmt: skip
    values = {"D(vanilla)": (0.5, 0.4, 0.6), "D(QAT)": (0.3, 0.2, 0.4), "I": (-0.2, None, 0.1)}
    effects = [{**common, "effect": e, "value": v, "low": low, "high": high} for e, (v, low, high) in values.items()]
    page = render({**record, "effects": effects}, out)
    text = " ".join(Seen(page).texts)
    assert "Interaction of base and precision" in page
    assert "-0.2 [−∞, 0.1]" in text
    assert re.search(r"D\(QAT\)\s+kld\[assistant,on-policy\], kld mean, NF4\s+0.3 \[0.2, 0.4\]", text)
    assert re.search(r"T\s+not measured", text)
    assert "“<b>qat”" in "".join(Seen(page).texts)


def test_an_instruct_model_on_bare_text_is_marked(page: str, record: dict[str, Any], out: Path) -> None:
    assert page.count("Out of frame: an instruct model on bare text") == 2
    tame = deepcopy(record)
    for block in tame["protocols"]:
        block["out_of_frame"] = False
    assert "Out of frame" not in render(tame, out)


def test_figures_from_outside_the_frame_stand_beside_sound_ones(page: str, record: dict[str, Any], out: Path) -> None:
    text = " ".join(Seen(page).texts)
    assert "An instruct model prices text outside its own turns as noise." in text
    raw = [c for b in record["protocols"] if b["protocol"] == "ppl[raw]" for c in b["candidates"]]
    for candidate in raw:
        ratio = next(f for f in candidate["figures"] if f["figure"] == "ppl ratio")
        assert f"times {printed(ratio['value'])} [" in text
    assert "prices text outside its own turns as noise" in section(record)
    sound = {**record, "protocols": [b for b in record["protocols"] if not b["out_of_frame"]]}
    assert "as noise" not in render(sound, out)
    assert "as noise" not in section(sound)


def test_text_of_strangers_stays_text(page: str, record: dict[str, Any]) -> None:
    seen = Seen(page)
    assert not {"b", "i", "u", "script"} & set(seen.tags)
    assert "\u202e" not in page
    text = "".join(seen.texts)
    assert f"{HOSTILE}@nf4" in text
    assert "<i>chats.jsonl" in text
    assert "<u>" in text
    markdown = section(record)
    assert "<script" not in markdown
    assert "<b>" not in markdown.replace(markdown[markdown.index("```sh") :], "")
    assert "http://evil" not in markdown


def test_a_narrow_screen_cuts_nothing_off(page: str) -> None:
    """One heading, every table in a box that scrolls inside itself (worst tokens are stacked instead), nothing of fixed width."""
    assert page.count("<h1>") == 1
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    boxes = re.findall(r'<div class="(\w+)"><table>', page)
    assert len(boxes) == page.count("<table>") > 5
    assert set(boxes) == {"scroll", "worst"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert ".scroll { overflow-x: auto;" in style
    assert ".scroll td:first-child { position: sticky;" in style, "a row that is scrolled still says what it is"
    assert not re.search(r"<svg[^>]* (width|height)=", page), "drawings take the width there is"


def test_a_sentence_in_a_table_wraps_and_a_number_does_not(record: dict[str, Any], out: Path) -> None:
    """One long line about the residual stream once pushed the second candidate off a wide screen."""
    told = deepcopy(record)
    points = [{"at": "layer", "layer": n, "sqnr_db": 9.0 - n, "median_db": 8.0 - n, "identical": False, "floor_db": None} for n in (0, 1)]  # fmt: skip
    for candidate in told["protocols"][0]["candidates"]:
        candidate["residual"] = {"rows": 3, "n": 90, "points": points}
    page = render(told, out)
    assert '<td class="said">first differs after layer 0; median 8.0 dB' in page
    assert "td.said { min-width: 14rem; max-width: 22rem; }" in page
    assert not re.search(r'<td class="n">first differs', page)


def test_a_model_that_knows_nothing_does_not_press_the_others_flat(
    page: str, record: dict[str, Any], out: Path
) -> None:
    drawings = re.findall(r"<figure>(.*?)</figure>", render(swapped(record), out), re.DOTALL)
    named = {
        label: [d for d in drawings if f'aria-label="{label}"' in d]
        for label in ("KL divergence histogram", "KL divergence by confidence", "KL divergence along the window")
    }
    assert any("nothing" in drawing for drawing in named["KL divergence histogram"])
    for label in ("KL divergence by confidence", "KL divergence along the window"):
        assert named[label]
        assert not any("nothing" in drawing.partition("<figcaption>")[0] for drawing in named[label][:1])


def swapped(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its first candidate called `nothing` and taken for a model that knows nothing."""
    changed = deepcopy(record)
    first = changed["bases"][0]["candidates"][0]
    name, first["id"], first["kind"] = first["id"], "nothing", "uniform"
    for block in changed["protocols"]:
        for candidate in block["candidates"]:
            if candidate["candidate"] == name:
                candidate["candidate"] = "nothing"
    return changed


def test_drawings_do_not_share_ids_and_wear_the_page_s_colours(page: str) -> None:
    ids = [value for name, value in Seen(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.count("<svg") >= 6 + 2
    assert "#0102" not in page
    assert "currentColor" in page
    assert "var(--series-1)" in page


def test_the_page_is_the_same_every_time(page: str, out: Path, record: dict[str, Any]) -> None:
    assert render(record, out) == page


def test_markdown_has_the_same_figures(record: dict[str, Any], out: Path, page: str) -> None:
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert markdown == section(record)
    for block in record["protocols"]:
        for candidate in block["candidates"]:
            kld = candidate["figures"][0]
            assert f"{printed(kld['value'])} \\[{printed(kld['low'])}, {printed(kld['high'])}\\]" in markdown


def test_the_record_is_valid_against_the_published_schema(record: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert list(violations(record, schema, schema)) == []
    for spoil in (
        lambda r: r["protocols"][0]["candidates"][0]["figures"][0].pop("low"),
        lambda r: r["protocols"][0]["candidates"][0]["figures"][0].update(n="many"),
        lambda r: r["bases"][0]["size"].update(guess=1),
        lambda r: r["protocols"][0]["candidates"][0]["verdicts"][0].update(verdict="fine"),
        lambda r: r["settings"].update(margin=-1),
    ):
        broken = deepcopy(record)
        spoil(broken)
        assert len(list(violations(broken, schema, schema))) == 1


def test_vectors_of_another_run_are_refused(out: Path, tmp_path: Path, record: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    name = record["protocols"][0]["candidates"][1]["vectors"]["file"]
    arrays = dict(np.load(folder / name))
    np.savez(folder / name, **{**arrays, "kld": arrays["kld"] * 1.001})
    with pytest.raises(SourceError, match="not those that the record speaks of"):
        report(folder)
    (folder / name).unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        report(folder)
    record = deepcopy(record)
    record["protocols"][0]["vectors"]["file"] = "vectors/../../../etc/passwd.npz"
    with pytest.raises(SourceError, match="not the name of a vectors file"):
        render(record, folder)


def test_no_evaluation_is_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no evaluation"):
        report(tmp_path)


def test_a_report_needs_no_torch(out: Path) -> None:
    code = "import sys; from halfbyte.cards.report import report; report(sys.argv[1]); print(sorted({m.partition('.')[0] for m in sys.modules}))"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "matplotlib" in ended.stdout
    assert not re.search(r"'(torch|transformers|bitsandbytes|numba)'", ended.stdout)
