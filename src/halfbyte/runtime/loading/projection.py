"""What stands where a bitsandbytes Linear4bit stood, without a change to transformers' code.

q, k and v read the same x; as one weight they are one launch, and x is read once. But transformers' attention asks for them one
after another. So they are computed on the way into the attention (a forward pre-hook) and lie ready in its `Stack`:

    hook:                    stack.offer(x)            one product, split by rows
    attention's own code:    q_proj(x), k_proj(x)      x is the tensor that was offered: each takes its part
    hook:                    stack.withdraw()          nothing outlives the forward pass

A projection that is asked anything else, by anybody, at any time, computes its own part of the weight: rows of a stack are a
view of it. So a wrong guess about a class costs time, never a result. Torch traces all of it: "is the tensor" is known while
tracing, and the stack is empty again at the end.

The catch: between the hooks, x must not be changed in place. No class in `replacement.KNOWN` does.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.errors import UsageError
from halfbyte.runtime.linear.module import Nf4Linear, nf4_linear

#: names of what is stacked -> the attention's or MLP's attribute that holds the stack
ATTRIBUTES = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("q_proj", "k_proj"): "qk_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
#: the attribute that says which of them an attention or MLP has
STACKED_IN = "nf4_stacked_in"


class Stack(torch.nn.Module):
    """Linear layers that share their input, as one Nf4Linear: [..., in_features] -> [..., rows of all]; `splits` cuts it.

    compute_dtype  x is brought to it and the result back to x's dtype, as Linear4bit does; None leaves x alone
    """

    held: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None

    def __init__(self, linear: Nf4Linear, names: tuple[str, ...], compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.linear, self.names, self.compute_dtype = linear, names, compute_dtype
        self.held = None

    @property
    def splits(self) -> tuple[int, ...]:
        """Rows of each of `names`."""
        return self.linear.splits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All products side by side."""
        y: torch.Tensor = self.linear(x.to(self.compute_dtype or x.dtype))
        return y.to(x.dtype)

    def offer(self, x: torch.Tensor) -> None:
        """Compute all products of x and keep them until `withdraw`."""
        self.held = (x, self(x).split(self.splits, dim=-1))

    def withdraw(self) -> None:
        """Forget them."""
        self.held = None

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Product number `index`: the one that lies ready if it is for this very tensor, else computed now."""
        held = self.held
        if held is not None and held[0] is x:
            return held[1][index]
        if len(self.names) == 1:
            whole: torch.Tensor = self(x)
            return whole
        y = nf4_linear(x.to(self.compute_dtype or x.dtype), self.linear.weight.part(index), self.linear.paths)
        if self.linear.bias is not None:
            y = y + self.linear.bias.split(self.splits)[index].to(y.dtype)
        return y.to(x.dtype)


class Nf4Projection(torch.nn.Module):
    """In place of one Linear4bit: same input, same output, same entries of the state dict.

    original  the Linear4bit, emptied; `restore` fills it again
    stack     the weight; registered here only if it is not the attention's or MLP's
    """

    stack: Stack
    bias: torch.nn.Parameter | None

    def __init__(self, original: Any, stack: Stack, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.index = index
        weight = original.weight
        self.stored_as = (weight.data.dtype, tuple(weight.data.shape))
        self.register_parameter("bias", original.bias)
        if len(stack.names) == 1:
            self.stack = stack
        else:
            self.__dict__["stack"] = stack  # a child of the attention or MLP: it must not be moved or counted twice
        self.__dict__["original"] = original
        original.weight = original.quant_state = None  # its tensors are free from here on
        self.train(original.training)

    @property
    def weight(self) -> torch.Tensor:
        """Its bytes, uint8 as in Linear4bit but in our order: for code that asks a linear for its weight's dtype or device."""
        return self.stack.linear.weight.part(self.index).tiles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias, in x's dtype."""
        return self.stack.take(x, self.index)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that came in, names and bytes: `weight`, `absmax`, ... (halfbyte.runtime.linear.tensors)."""
        found = self.stack.linear.weight.stored_part(self.index).to_dict()
        dtype, shape = self.stored_as
        return found | {"weight": found["weight"].view(-1).view(dtype).reshape(shape)}

    def restore(self) -> Any:
        """The Linear4bit again, with its weight on the device where this layer is now."""
        from bitsandbytes.nn import Params4bit

        tensors, original = self.tensors(), self.__dict__["original"]
        weight = tensors.pop("weight")
        original.weight = Params4bit.from_prequantized(weight, tensors, device=weight.device, module=original)
        original.bias = self.bias
        return original.train(self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As Linear4bit writes it. From a GPU to host memory: a second model would not fit beside the first."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.tensors().items():
            key = "weight" if name == "weight" else f"weight.{name}"
            destination[prefix + key] = tensor.cpu()

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        raise UsageError(
            "weights cannot be loaded into a replaced linear",
            where=type(self).__name__,
            todo="call halfbyte.runtime.loading.replacement.restore(model) first, or load with fast=False",
        )

    def extra_repr(self) -> str:
        """For print(model)."""
        beside = f", part {self.index} of {len(self.stack.names)}" if len(self.stack.names) > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{beside}"


def share(owner: torch.nn.Module, stack: Stack) -> None:
    """Give an attention or MLP its stack, and the hooks that fill and empty it."""
    owner.__dict__[STACKED_IN] = ATTRIBUTES[stack.names]
    setattr(owner, ATTRIBUTES[stack.names], stack)
    owner.register_forward_pre_hook(_offer, with_kwargs=True)
    owner.register_forward_hook(_withdraw, always_call=True)


def unshare(owner: torch.nn.Module) -> None:
    """The reverse of `share`."""
    for hook, names in (
        (_offer, ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")),
        (_withdraw, ("_forward_hooks", "_forward_hooks_always_called")),
    ):  # by hand and not by the handles: a copied model has copies of the hooks, not of the handles
        hooks = getattr(owner, names[0])
        for key in [key for key, value in hooks.items() if value is hook]:
            for name in names:
                getattr(owner, name).pop(key, None)
    delattr(owner, owner.__dict__.pop(STACKED_IN))


def stack_of(owner: torch.nn.Module) -> Stack | None:
    """The stack of an attention or MLP, if it has one."""
    name = owner.__dict__.get(STACKED_IN)
    found: Stack | None = None if name is None else getattr(owner, name)
    return found


def _offer(owner: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    x, stack = arguments[0] if arguments else named.get("hidden_states"), stack_of(owner)
    if isinstance(x, torch.Tensor) and stack is not None:
        stack.offer(x)


def _withdraw(owner: torch.nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
    stack = stack_of(owner)
    if stack is not None:
        stack.withdraw()
