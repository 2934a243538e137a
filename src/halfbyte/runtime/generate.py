"""`halfbyte generate`: the model card's usage snippet as a command.

Nothing here knows NF4: the checkpoint is loaded by `halfbyte.load`, the prompt goes through the chat template (or as it
is, if the model has none), and tokens are streamed as they come, on a GPU by our decode loop (`halfbyte.runtime.decode`), else, and for
models that it does not know, by transformers' `generate`; the result says which, and why. With `fast=False` all of it is stock transformers
and bitsandbytes: the honest baseline that every faster path of ours is held against.

Catch: a 31B prompt on a CPU takes minutes; the time to the first token is reported apart from the rate of the rest. And a sampled text
depends on who draws: the same seed gives another text in our loop than in transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import UsageError
from halfbyte.images import open_image
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.runtime.loading.checkpoint import load, pick_device, transformers_errors

if TYPE_CHECKING:
    from PIL.Image import Image

    from halfbyte.runtime.decode.loop import Decoder

#: options of transformers' `generate`, by its names, and of our loop: `speculate`
GENERATION_OPTIONS = (
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "speculate",
)  # fmt: skip
MAX_NEW_TOKENS = 256
#: caches of our loop come in steps of so many tokens, so that the next answer fits too
ROOM = 512


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
    fast        our linears: True wherever possible, False nowhere, None where they are measured to be faster (`halfbyte.load`);
                our decode loop: True always, False never, None on a GPU
    stream      called with each piece of text as it is decoded
    options     any of GENERATION_OPTIONS; greedy unless do_sample or a sampling option is given; speculate: tokens to guess ahead
                from what the text already said, 0 to 15: the text is the same, and only our loop does it
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
        self.by_loop = self.device != "cpu" if fast is None else fast
        self._not_by_loop = "the CPU's default" if fast is None else "asked for"
        self._decoder: Decoder | None = None
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
        self,
        prompt: str,
        images: Sequence[Image],
        stream: Callable[[str], None] | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """One answer and what it took; see `generate`."""
        import torch

        settings, speculate = generation_settings(options), options.get("speculate") or 0
        inputs = self.inputs(prompt, images)
        length = inputs["input_ids"].shape[1]
        decoder, why = self._loop_for(length + settings["max_new_tokens"])
        if decoder is None and speculate:
            raise UsageError(f"guessing ahead needs our decode loop: {why}", where="--speculate", todo="leave it out")
        watch = _stream_watch(getattr(self.processor, "tokenizer", self.processor), stream)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        if decoder is None:
            new = self._by_transformers(inputs, settings, options.get("seed"), watch)
        else:
            new = self._by_loop(decoder, inputs, settings | {"seed": options.get("seed")}, speculate, watch)
        seconds = time.perf_counter() - start
        first = watch.first - start if watch.first is not None else seconds
        rest = len(new) - 1
        return {
            "text": self.processor.decode(new, skip_special_tokens=True),
            "token_ids": new,
            "prompt_tokens": length,
            "new_tokens": len(new),
            "seconds_to_first_token": round(first, 4),
            "tokens_per_second": round(rest / (seconds - first), 2) if rest > 0 and seconds > first else None,
            "device": self.device,
            "decoded_by": {"name": "transformers" if decoder is None else "halfbyte", "why": why},
            "speculation": decoder.report if decoder is not None and speculate else None,
            "linears": self.model.halfbyte.to_dict(),
            "linears_summary": self.model.halfbyte.summary(),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(self.device),
        }

    def _loop_for(self, capacity: int) -> tuple[Decoder | None, str | None]:
        """Our decode loop with room for `capacity` tokens, its step recorded; or None and why not."""
        if not self.by_loop:
            return None, self._not_by_loop
        from halfbyte.runtime.decode.description import NotDescribed
        from halfbyte.runtime.decode.loop import Decoder

        if self._decoder is None or self._decoder.capacity < capacity:
            try:
                self._decoder = Decoder(self.model, 1, -(-capacity // ROOM) * ROOM)
            except NotDescribed as error:
                return None, error.what
        return self._decoder, None

    def _by_loop(
        self, decoder: Decoder, inputs: Any, settings: dict[str, Any], speculate: int, watch: Any
    ) -> list[int]:
        import secrets

        from halfbyte.runtime.decode.sampling import sampling_of

        if settings["seed"] is None:
            settings["seed"] = secrets.randbits(31)
        sampling = sampling_of(settings, self.model.generation_config)
        new: list[int] = []
        watch.put(inputs["input_ids"].cpu())
        count = settings["max_new_tokens"]
        for rows in decoder.tokens(dict(inputs), count, sampling=sampling, speculate=speculate):
            for token in rows[0]:
                new.append(token)
                watch.put(_one(token))
        watch.end()
        return new

    def _by_transformers(self, inputs: Any, settings: dict[str, Any], seed: int | None, watch: Any) -> list[int]:
        import torch

        if seed is not None:
            torch.manual_seed(seed)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **settings, streamer=watch)
        return list(output[0, inputs["input_ids"].shape[1] :].tolist())


def _one(token: int) -> Any:
    import torch

    return torch.tensor([token])


def generation_settings(options: dict[str, Any]) -> dict[str, Any]:
    """transformers' generate arguments: greedy unless a sampling option asks otherwise (its own defaults may sample)."""
    given = {name: value for name, value in options.items() if value is not None and name not in ("seed", "speculate")}
    given.setdefault("max_new_tokens", MAX_NEW_TOKENS)
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
