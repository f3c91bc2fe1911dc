"""The linear layers of a model that share their input, and so the choice of its channels."""

from __future__ import annotations

from torch import nn

from ..generation.huggingface import CLASSES

SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def groups_of(model: nn.Module, who: str) -> list[list[tuple[str, ...]]]:
    """For each decoder layer its groups: names of the linear layers of one input. The head is not among them.

    Raises:
        ValueError: beginning with `who`; a model of another family, or a layer that is not a dense one.
    """
    if type(model).__name__ not in CLASSES.values():
        raise ValueError(f"{who}: a {type(model).__name__} is none of {', '.join(CLASSES.values())}")
    layers = model.get_submodule("model.layers")
    found = []
    for index in range(len(list(layers.children()))):
        at = f"model.layers.{index}"
        found.append([tuple(f"{at}.{name}" for name in names) for names in SHARED])
        for name in (name for names in found[-1] for name in names):
            kind = type(model.get_submodule(name))
            if kind is not nn.Linear:
                raise ValueError(f"{who}: {name} is a {kind.__name__}, not a dense layer (torch.nn.Linear)")
    return found
