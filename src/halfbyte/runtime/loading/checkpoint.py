"""halfbyte.load: a checkpoint through transformers, then our linears where they are faster.

    model = halfbyte.load("gemma-4-31b-it-nf4")         a transformers model: generate, save_pretrained, forward hooks work
    print(model.halfbyte.summary())                      what became of every linear, and why

    fast="auto"    on a GPU what was measured there; on a CPU bitsandbytes' own (ours computes through the codec there)
    fast=True      ours wherever the format allows
    fast=False     bitsandbytes' everywhere: the stock model

transformers sees the same modules under the same names, and `save_pretrained` writes the bytes that were read. (transformers 5.23 by itself
cannot save a bitsandbytes model that it has loaded, see `let_save`.) What it says of such models stays true of this one, also that `generate` will not compile it (`Bnb4BitHfQuantizer.is_compileable` is
False); `torch.compile(model.forward)` works.

The catch: no gradients. To train, load with fast=False, or put bitsandbytes' linears back with `replacement.restore`. And where they stay
bitsandbytes' on a CPU with AVX512-BF16, the first forward pass rounds their scales for good (0.50.2 expands them to bfloat16): save
before it, or load with fast=True.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from halfbyte.device import check_device
from halfbyte.errors import SourceError, UsageError


def load(path: str | Path, *, device: str = "auto", fast: bool | Literal["auto"] = "auto") -> Any:
    """A transformers model, in eval mode, on one device; `model.halfbyte` is the Report of its 4-bit linears.

    path    folder that transformers can load, NF4 or not
    device  `auto` (a GPU if there is one), `cpu`, `cuda[:N]`
    fast    see above
    raises  SourceError (not a checkpoint, or transformers cannot load it), UsageError (device, fast)
    """
    from halfbyte.format.checkpoint import read_config
    from halfbyte.recipe.skeleton import auto_class_of

    if fast not in (True, False, "auto"):
        raise UsageError(f"fast is {fast!r}", where="load", todo="pass True, False or 'auto'")
    folder = Path(path)
    config = read_config(folder)
    if not folder.is_dir():
        raise SourceError("not a checkpoint folder", where=str(folder), todo="name the folder that quantize wrote")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    device = pick_device(device)
    auto_class = getattr(transformers, auto_class_of(config))
    with transformers_errors(folder):
        model = auto_class.from_pretrained(
            folder, dtype="auto", device_map={"": device}, trust_remote_code=False, local_files_only=True
        )
    let_save(model)
    choose_linears(model, device, fast)
    return model


def let_save(model: Any) -> None:
    """Forget that bitsandbytes' tensors were put together on the way in: they are apart again in the state dict.

    transformers undoes at saving what it did at loading, and has no inverse of this one step: NotImplementedError (5.23). All other
    steps, renamings above all, stay.
    """
    steps = getattr(model, "_weight_conversions", None)
    if steps is not None:
        model._weight_conversions = [
            step
            for step in steps
            if not any(type(work).__name__ == "Bnb4bitDeserialize" for work in getattr(step, "operations", ()))
        ]


def choose_linears(model: Any, device: str, fast: bool | Literal["auto"]) -> None:
    """Replace what `fast` says, in place, and write `model.halfbyte`. For a model that is loaded already."""
    from halfbyte.runtime.loading import choice, replacement, timing

    if fast is False:
        replacement.leave(model, "fast=False")
    elif device != "cpu":
        index = int(device.partition(":")[2] or 0)
        replacement.replace(
            model, choice.Measured(timing.times_file(index), timing.time_paths, against_theirs=fast == "auto")
        )
    elif fast is True:
        replacement.replace(model, choice.Always("fast=True"))
    else:
        replacement.leave(model, "faster on a CPU")


def pick_device(device: str) -> str:
    """`auto` resolved. raises UsageError for a device that is not there"""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


@contextmanager
def transformers_errors(folder: Path) -> Iterator[None]:
    """What transformers raises about a folder, as a SourceError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SourceError(
            f"transformers cannot load it: {str(error).strip().splitlines()[0][:300]}",
            where=str(folder),
            todo="run `halfbyte verify` on it",
        ) from error
