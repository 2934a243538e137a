"""Drafts by looking the last words up in the text so far ("prompt lookup"), on the device.

The last three tokens (or two) are sought earlier in the row's text; what followed them there is the draft. A step then runs draft and
all, T tokens instead of one: with kernels that cost the same for 1 to 16 rows that is nearly free, and every right draft saves a step.
What is kept is only what plain decoding would have chosen (halfbyte.runtime.decode.kernels.append), so a bad draft costs nothing but
itself: where nothing is found, whatever lies there is drafted.

    place of the match = the largest of (length of the match, position), position <= length - 3
    draft              = what follows it, and again from the start when it reaches the end of the text (a loop repeats itself)

It pays where answers quote their prompt (summaries, code, corrections), not in free prose. The report says which it was.
"""

from __future__ import annotations

import torch

from halfbyte.runtime.decode.state import State


def draft(state: State, steps: int) -> torch.Tensor:
    """int64 [rows, steps]: each row's last token, then steps - 1 guesses."""
    history, length = state.history, state.length
    last = length[:, None] - 1
    first = history.gather(1, last)
    if steps == 1:
        return first
    before = history.gather(1, (last - 1).clamp_min(0))
    earlier = history.gather(1, (last - 2).clamp_min(0))
    place = torch.arange(history.shape[1] - 1, device=history.device)
    two = (history[:, :-1] == before) & (history[:, 1:] == first) & (place + 1 < last)
    three = two[:, 1:] & (history[:, :-2] == earlier) & (length[:, None] > 2)
    score = two.long()
    score = torch.cat([score[:, :1], score[:, 1:] + three.long()], dim=1) * history.shape[1] + place
    found = torch.where(two, score, -1).argmax(-1, keepdim=True)
    follows = found + 2
    period = (length[:, None] - follows).clamp_min(1)
    guess = history.gather(1, follows + torch.arange(steps - 1, device=history.device) % period)
    return torch.cat([first, guess], dim=1)
