"""Train the embedded pair, from nothing, with one command:

    python -m halfbyte.demo.school.train_pair OUT --data FOLDER

    start      random weights, a tokenizer learned from the lessons           OUT/start
    vanilla    taught with cross-entropy (`lessons`)                          OUT/vanilla
    qat        vanilla, distilled from itself onto q4_0                       OUT/qat
    qat-nf4    the same onto NF4                                              OUT/qat-nf4
    scores     held-out questions, exact answers, of each and of its roundings  OUT/scores.json, and their cards

FOLDER holds `wikipedia/wiki.utf8` and `chat/*.jsonl` (SOURCES.md beside the pair says where they come from). Each stage is
skipped if its folder is complete, and continues from its checkpoint if it is not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.demo.school.pair_card import write_cards
from halfbyte.demo.school.questions import TAUGHT, draw_questions
from halfbyte.demo.school.small_gemma4 import write_untrained
from halfbyte.progress import Advance, listening
from halfbyte.records import write_text_atomic

SEED = 20261124


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage; 0 leaves a QAT stage out."""

    vanilla: int = 8000
    qat: int = 800


def train_pair(out: Path, data: Path, steps: Steps, *, device: str, workers: int) -> dict[str, Any]:
    """Run every stage; returns the scores. `workers`: processes that draw lessons."""
    from transformers import AutoTokenizer

    from halfbyte.demo.school.lessons import MIXTURE, Lessons, batches_of_lessons, read_pages
    from halfbyte.trainer.loop import Settings

    pages = read_pages(data)
    if not (out / "start" / "config.json").exists():
        write_untrained(out / "start", _words(pages), SEED)
    tokenizer = AutoTokenizer.from_pretrained(out / "start")
    seconds: dict[str, float] = {}

    def run(name: str, stage: Callable[..., None], count: int, *settings: Any) -> None:
        if count == 0 or (out / name / "config.json").exists():
            return
        started = time.perf_counter()
        batches = batches_of_lessons(Lessons(tokenizer, pages, MIXTURE, _seed(name), count), device, workers)
        stage(out, name, batches, *settings, device)
        seconds[name] = round(time.perf_counter() - started, 1)

    taught = Settings(steps.vanilla, 2.5e-3, 200, weight_decay=0.1, save_every=2000, autocast=False, graphed=True)
    run("vanilla", _teach, steps.vanilla, "start", taught)
    qat = Settings(steps.qat, 1e-4, 40, save_every=400, autocast=False)
    run("qat", _distil, steps.qat, "q4_0", replace(qat, graphed=True))
    run("qat-nf4", _distil, steps.qat, "nf4", qat)  # its rounding asks the GPU whether weights are finite: no graph
    scores = {name: _score(out / name, device) for name in ("vanilla", "qat", "qat-nf4") if (out / name).is_dir()}
    body = {"seconds": seconds, "steps": asdict(steps), "scores": scores}
    write_text_atomic(out / "scores.json", json.dumps(body, indent=1) + "\n")
    write_cards(out, body)
    return body


def _seed(name: str) -> int:
    """Each stage has lessons of its own, except that both QAT runs see the same."""
    return SEED + ("vanilla", "qat").index(name.removesuffix("-nf4"))


def _score(folder: Path, device: str) -> dict[str, Any]:
    """Held-out answers of a checkpoint as it is (`bf16`) and with its decoder linears rounded to each grid."""
    from transformers import AutoTokenizer

    from halfbyte.demo.school.held_out import examine
    from halfbyte.trainer.grids import GRIDS, round_to_grid
    from halfbyte.trainer.qat import load_model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = {}
    for grid in ("bf16", *GRIDS):
        model = load_model(folder, device).eval()
        for name in _linears(folder) if grid != "bf16" else ():
            weight = model.get_submodule(name).weight
            weight.data.copy_(round_to_grid(weight, grid))
        scores[grid] = examine(model, tokenizer, texts=1000, pictures=500, device=device)
    return scores


def _linears(folder: Path) -> list[str]:
    """Module paths of the decoder's linears: what the default plan turns into NF4."""
    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.recipe.survey import plan_of

    plan = plan_of(SafetensorsSource(folder), preset="decoder-only", allow_disagreement=False)
    return [d.module for d in plan.decisions if d.action == "nf4" and d.module]


def _words(pages: Any) -> str:
    """What the tokenizer learns from: the pages, and as many questions again."""
    asked = "\n".join(f"{item.prompt}\n{item.answer}" for item in draw_questions(SEED, 6000, held_out=False))
    taught = "\n".join(f"{prompt}\n{answer}" for prompt, answer in TAUGHT * 20)
    return "\n".join([pages.wikipedia, *(f"{a}\n{b}" for a, b in pages.instructions), asked, taught])


def _in_lessons(out: Path) -> Callable[[Any], Any]:
    """Model -> its forward pass over lessons, which never waits for the GPU."""
    from transformers import AutoTokenizer

    from halfbyte.demo.school.forward import LessonForward
    from halfbyte.demo.school.lessons import SOFT_TOKENS, Frame

    start = Frame(AutoTokenizer.from_pretrained(out / "start")).image_start
    return lambda model: LessonForward(model, start, SOFT_TOKENS)


def _teach(out: Path, name: str, batches: Any, begin: str, settings: Any, device: str) -> None:
    """Train OUT/`begin` with cross-entropy into OUT/`name`."""
    import torch

    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.trainer.loop import train
    from halfbyte.trainer.losses import cross_entropy
    from halfbyte.trainer.plain_checkpoint import write_plain
    from halfbyte.trainer.qat import load_model

    model = load_model(out / begin, device)
    work, pupil = out / f"{name}-work", _in_lessons(out)(model)
    train(model, batches, lambda batch: cross_entropy(pupil, batch), settings, work)
    with torch.no_grad():
        weights = {key: p.detach() for key, p in model.named_parameters()}
    write_plain(SafetensorsSource(out / begin), out / name, weights)
    (work / "loss.jsonl").rename(out / f"{name}.loss.jsonl")
    shutil.rmtree(work)


def _distil(out: Path, name: str, batches: Any, grid: str, settings: Any, device: str) -> None:
    """QAT of OUT/vanilla onto `grid` into OUT/`name`."""
    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.trainer.plain_checkpoint import write_plain
    from halfbyte.trainer.qat import train_onto_grid

    source = SafetensorsSource(out / "vanilla")
    work = out / f"{name}-work"
    shutil.copytree(out / "vanilla", work / "source", dirs_exist_ok=True)
    _, weights = train_onto_grid(
        work / "source", grid, _linears(out / "vanilla"), batches, settings, device, _in_lessons(out)
    )
    write_plain(source, out / name, weights)
    (work / "loss.jsonl").rename(out / f"{name}.loss.jsonl")
    shutil.rmtree(work)


class _Lines:
    """Progress as a line on stderr every tenth of the way: this runs for minutes, mostly without a terminal."""

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        done, started = 0, time.perf_counter()

        def advance(amount: int) -> None:
            nonlocal done
            if total and (done + amount) * 10 // total > done * 10 // total:
                print(
                    f"{title}: {done + amount}/{total} {unit}, {time.perf_counter() - started:.0f} s", file=sys.stderr
                )
            done += amount

        yield advance

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=2, default=astuple(Steps()), metavar=("VANILLA", "QAT"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    with listening(_Lines()):
        body = train_pair(args.out, args.data, Steps(*args.steps), device=args.device, workers=args.workers)
    print(json.dumps(body))


if __name__ == "__main__":
    main()
