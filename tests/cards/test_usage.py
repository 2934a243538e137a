"""The program on the card runs, exactly as printed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cards.paper_checkpoint import edit, small_plan, write_checkpoint
from markdown_it import MarkdownIt

from halfbyte.cards import card, usage_snippet
from halfbyte.cards.usage import addressed_to

KINDS = [("AutoModelForCausalLM", False), ("AutoModelForImageTextToText", False), ("AutoModelForImageTextToText", True)]


def program_of(text: str) -> str:
    (program,) = [t.content for t in MarkdownIt("commonmark").parse(text) if t.type == "fence" and t.info == "python"]
    return program


def run_in(folder: Path, program: str) -> list[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize(("auto_class", "has_images"), KINDS)
def test_program_is_python_of_under_twenty_lines_that_names_the_model(auto_class: str, has_images: bool) -> None:
    program = usage_snippet(auto_class, has_images, "org/name")
    tree = ast.parse(program)
    assert len([line for line in program.splitlines() if line]) < 20
    assert 'model_id = "org/name"\n' in program
    assert ("PIL" in program) == has_images == ("What is in this image?" in program)
    assert any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))


@pytest.mark.parametrize("name", ['a"\nimport os', "a'b", "back\\slash", "{model_id}", "ü\u2028\U0001f600", "a\x00b"])
def test_hostile_name_stays_one_string(name: str) -> None:
    for auto_class, has_images in KINDS:
        assigned = [
            node for node in ast.parse(usage_snippet(auto_class, has_images, name)).body if isinstance(node, ast.Assign)
        ]
        assert ast.literal_eval(assigned[0].value) == name


def test_unknown_auto_class_is_refused() -> None:
    with pytest.raises(ValueError, match="auto_class"):
        usage_snippet("AutoModel", False, "org/name")


def test_program_printed_on_the_card_answers_about_text_and_image(tmp_path: Path, tiny_gemma4: Path) -> None:
    text = card(write_checkpoint(tmp_path / tiny_gemma4.name)).read_text(encoding="utf-8")
    answers = run_in(tiny_gemma4.parent, program_of(text))
    assert len(answers) >= 2


def test_program_for_text_models_answers(tmp_path: Path, tiny_gemma4: Path) -> None:
    plan = small_plan()
    plan["model"]["auto_class"] = "AutoModelForCausalLM"
    text = card(write_checkpoint(tmp_path / tiny_gemma4.name, plan)).read_text(encoding="utf-8")
    assert run_in(tiny_gemma4.parent, program_of(text))


def test_only_the_programs_own_line_is_readdressed(checkpoint: Path) -> None:
    edit(checkpoint, "verify", lambda body: body["stock"]["answers"][0].update(answer='model_id = "tiny-nf4"'))
    text = card(checkpoint).read_text(encoding="utf-8")
    sent = addressed_to(text, "org/name")
    assert 'model_id = "org/name"' in program_of(sent)
    assert sent.replace('model_id = "org/name"', 'model_id = "tiny-nf4"') == text
    assert sent.count('model_id = "tiny-nf4"') == 1
