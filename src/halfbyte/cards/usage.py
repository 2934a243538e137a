"""The program on the card: complete, offline once the weights are there, and run by a test exactly as printed.

Stock transformers is all it needs (bitsandbytes reads the weights). `device_map="auto"` puts the model on a GPU if there
is one; `dtype` is that of the kept tensors. The image is drawn, so that the program runs before the reader has one.
"""

from __future__ import annotations

import json
import re

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
#: the line that names the model; `push` rewrites it to the repository
_MODEL_LINE = re.compile(r"^model_id = .*$", re.MULTILINE)

_TEXT = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = {model_id}
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.bfloat16, device_map="auto")

messages = [{{"role": "user", "content": "Name three primary colors."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
inputs = inputs.to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_MULTIMODAL = """\
import torch
{pillow}from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = {model_id}
processor = AutoProcessor.from_pretrained(model_id)
model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.bfloat16, device_map="auto")

text = [{{"type": "text", "text": "Name three primary colors."}}]
{image}for content in {contents}:
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(model.device, dtype=torch.bfloat16)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_IMAGE = """\
picture = Image.new("RGB", (256, 256), "red")  # or Image.open("photo.jpg")
image = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in this image?"}]
"""


def usage_snippet(auto_class: str, has_images: bool, model_id: str) -> str:
    """A Python program that asks the model and prints the answer; under 20 lines of code.

    auto_class  `AutoModelForImageTextToText` or `AutoModelForCausalLM`, as in the plan's `model`
    has_images  also ask about an image (drawn in the program)
    model_id    hub id or local folder
    raises      ValueError for another auto class
    """
    if auto_class not in AUTO_CLASSES:
        raise ValueError(f"auto_class must be one of {AUTO_CLASSES}, not {auto_class!r}")
    if auto_class == "AutoModelForCausalLM":
        return _TEXT.format(model_id=_quoted(model_id))
    return _MULTIMODAL.format(
        model_id=_quoted(model_id),
        pillow="from PIL import Image\n" if has_images else "",
        image=_IMAGE if has_images else "",
        contents="(text, image)" if has_images else "(text,)",
    )


def addressed_to(card: str, model_id: str) -> str:
    """`card` with its program naming `model_id` instead of the folder; everything else, edits by hand included, stays."""
    lines = list(_MODEL_LINE.finditer(card))
    if not lines:
        return card
    # the last one: an answer printed above the program may hold such a line too
    begin, end = lines[-1].span()
    return f"{card[:begin]}model_id = {_quoted(model_id)}{card[end:]}"


def _quoted(model_id: str) -> str:
    """A Python string literal, in double quotes; JSON's is one as long as characters beyond ASCII stay as they are."""
    return json.dumps(model_id, ensure_ascii=False)
