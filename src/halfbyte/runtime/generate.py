"""`halfbyte generate`: the model card's usage snippet as a command, through transformers.

Nothing here knows NF4: the checkpoint is loaded by `halfbyte.load`, the prompt goes through the chat template (or as it
is, if the model has none), and tokens are streamed as they come. With `fast=False` it is stock transformers and
bitsandbytes: the honest baseline that every faster path of ours is held against.

Catch: `generate` keeps only the last prompt token's logits, but a 31B prompt on a CPU still takes minutes; the time to
the first token is reported apart from the rate of the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import UsageError
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.runtime.images import open_image
from halfbyte.runtime.loading.checkpoint import load, pick_device, transformers_errors

if TYPE_CHECKING:
    from PIL.Image import Image

#: options passed through to transformers' `generate`, by its names
GENERATION_OPTIONS = (
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
)  # fmt: skip


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    image: Sequence[str | Path] = (),
    device: str = "auto",
    fast: bool | None = None,
    stream: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer one prompt; returns {"text", "prompt_tokens", "new_tokens", "seconds_to_first_token", "tokens_per_second", ...}.

    checkpoint  folder that transformers can load (NF4 or not)
    image       image files, shown to the model before the prompt
    device      `auto` (a GPU if there is one), `cpu`, `cuda[:N]`
    fast        our linears: True wherever possible, False nowhere, None where they are measured to be faster (`halfbyte.load`)
    stream      called with each piece of text as it is decoded
    options     any of GENERATION_OPTIONS; greedy unless do_sample or a sampling option is given
    raises      UsageError (unknown option, image for a text model), SourceError (not a checkpoint)
    """
    unknown = options.keys() - set(GENERATION_OPTIONS)
    if unknown:
        raise UsageError(f"unknown option {min(unknown)!r}", todo=f"known: {', '.join(GENERATION_OPTIONS)}")
    images = [open_image(path) for path in image]
    chat = Chat(Path(checkpoint), device, fast)
    return chat.answer(prompt, images, stream, options)


class Chat:
    """A loaded checkpoint with its tokenizer or processor, ready to answer."""

    def __init__(self, folder: Path, device: str = "auto", fast: bool | None = False) -> None:
        from halfbyte.format.checkpoint import read_config
        from halfbyte.recipe.skeleton import auto_class_of

        self.config = read_config(folder)
        self.device = pick_device(device)
        self.auto_class = auto_class_of(self.config)
        self.model = load(folder, device=self.device, fast="auto" if fast is None else fast)
        with transformers_errors(folder):
            self.processor = self._load_processor(folder)

    def _load_processor(self, folder: Path) -> Any:
        from transformers import AutoProcessor, AutoTokenizer

        sees = self.auto_class == "AutoModelForImageTextToText" and any(folder.glob("*processor_config.json"))
        loader = AutoProcessor if sees else AutoTokenizer
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)

    @property
    def sees(self) -> bool:
        """Whether the checkpoint takes images."""
        return hasattr(self.processor, "image_processor")

    def inputs(self, prompt: str, images: Sequence[Image]) -> Any:
        """Tokens (and pixels) of one user turn, on the model's device."""
        if images and not self.sees:
            raise UsageError("this model takes no images", where="--image", todo="leave the image out")
        if not getattr(self.processor, "chat_template", None):
            return self.processor(prompt, return_tensors="pt").to(self.device)
        content: Any = prompt
        if self.sees:
            content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)

    def answer(
        self, prompt: str, images: Sequence[Image], stream: Callable[[str], None] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """One answer and what it took; see `generate`."""
        import torch

        settings = generation_settings(options)
        if (seed := options.get("seed")) is not None:
            torch.manual_seed(seed)
        inputs = self.inputs(prompt, images)
        watch = _stream_watch(getattr(self.processor, "tokenizer", self.processor), stream)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(**inputs, **settings, streamer=watch)
        seconds = time.perf_counter() - start
        new = output[0, inputs["input_ids"].shape[1] :]
        first = watch.first - start if watch.first is not None else seconds
        rest = len(new) - 1
        return {
            "text": self.processor.decode(new, skip_special_tokens=True),
            "token_ids": new.tolist(),
            "prompt_tokens": inputs["input_ids"].shape[1],
            "new_tokens": len(new),
            "seconds_to_first_token": round(first, 4),
            "tokens_per_second": round(rest / (seconds - first), 2) if rest > 0 and seconds > first else None,
            "device": self.device,
            "linears": self.model.halfbyte.to_dict(),
            "linears_summary": self.model.halfbyte.summary(),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(self.device),
        }


def generation_settings(options: dict[str, Any]) -> dict[str, Any]:
    """transformers' generate arguments: greedy unless a sampling option asks otherwise (its own defaults may sample)."""
    given = {name: value for name, value in options.items() if value is not None and name != "seed"}
    given.setdefault("max_new_tokens", 256)
    samples = {"temperature", "top_p", "top_k", "min_p"} & given.keys()
    given.setdefault("do_sample", bool(samples))
    if not given["do_sample"]:
        if samples:
            raise UsageError(
                f"{min(samples)} has no effect without sampling", where="--no-do-sample", todo="drop one of the two"
            )
        given |= {"temperature": None, "top_p": None, "top_k": None}  # silence the model's own sampling defaults
    return given


def _stream_watch(tokenizer: Any, stream: Callable[[str], None] | None) -> Any:
    """A transformers streamer that notes when the first new token came and hands finished text to `stream`."""
    from transformers import TextStreamer

    class Watch(TextStreamer):  # type: ignore[misc]
        first: float | None = None

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and self.first is None:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stream is not None and text:
                stream(text)

    return Watch(tokenizer, skip_prompt=True, skip_special_tokens=True)
