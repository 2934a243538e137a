"""The forward pass of the small Gemma 4 over lessons, without a single wait for the GPU.

transformers' own forward asks the device questions on the way: is the mask all ones, how many soft tokens does each picture
give, do they fit the placeholders. Each answer costs a synchronisation, and a CUDA graph cannot ask at all. In a lesson the
answers are known: rows are padded on the right, every picture is square and stands at the same place in its row. So its parts
are called one by one here, with masks made once:

    full layers      kv <= q
    sliding layers   kv > q - window, and (kv <= q or both in the picture)

It is the model's own modules throughout; tests/demo/test_school.py holds the result against the model's forward.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class LessonForward:
    """Stands for the model in `halfbyte.trainer.losses`: `base_model(...)`, `get_output_embeddings()`, `config`.

    model   Gemma4ForConditionalGeneration
    start   index of a picture's first soft token in its row
    soft    soft tokens a picture
    """

    def __init__(self, model: Any, start: int, soft: int) -> None:
        self.model, self.start, self.soft = model, start, soft
        self.config = model.config
        self._masks: dict[tuple[int, bool], dict[str, torch.Tensor]] = {}

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def base_model(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Hidden states [rows, length, hidden] behind the final norm, as `last_hidden_state`."""
        inner = self.model.model
        embedded = inner.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = self._see(pixel_values, image_position_ids).to(embedded.dtype)
            embedded = torch.cat([embedded[:, : self.start], seen, embedded[:, self.start + self.soft :]], dim=1)
        masks = self._masks_for(input_ids.shape[1], pixel_values is not None, input_ids.device)
        places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        states = inner.language_model(
            inputs_embeds=embedded, attention_mask=masks, position_ids=places, use_cache=False
        ).last_hidden_state
        return SimpleNamespace(last_hidden_state=states)

    def _see(self, pixels: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        """Soft tokens [pictures, soft, hidden of the decoder] of unpadded square pictures."""
        tower = self.model.model.vision_tower
        nowhere = torch.zeros(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
        states = tower.patch_embedder(pixels, places, nowhere)
        states = tower.encoder(inputs_embeds=states, attention_mask=None, pixel_position_ids=places).last_hidden_state
        pooled, _ = tower.pooler(states, places, nowhere, self.soft)
        pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        soft: torch.Tensor = self.model.model.embed_vision(inputs_embeds=pooled.to(states.dtype))
        return soft

    def _masks_for(self, length: int, shown: bool, device: torch.device) -> dict[str, torch.Tensor]:
        if (length, shown) not in self._masks:
            q = torch.arange(length, device=device)[:, None]
            kv = torch.arange(length, device=device)[None, :]
            causal = kv <= q
            inside = lambda i: (i >= self.start) & (i < self.start + self.soft)  # noqa: E731
            near = causal | (inside(q) & inside(kv)) if shown else causal
            window = self.config.text_config.sliding_window
            sliding = near & (kv > q - window)
            self._masks[length, shown] = {
                "full_attention": causal[None, None],
                "sliding_attention": sliding[None, None],
            }
        return self._masks[length, shown]
