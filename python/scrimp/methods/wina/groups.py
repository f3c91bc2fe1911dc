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
FUSED = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
UNGATED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.dense",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)
FAMILIES = {
    **dict.fromkeys(CLASSES.values(), SHARED),
    **dict.fromkeys(("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"), SHARED),
    "PhiForCausalLM": UNGATED,
    "Phi3ForCausalLM": FUSED,
}
RESIDUAL = ("q_proj", "qkv_proj", "gate_proj", "gate_up_proj", "fc1")  # first layers of what reads the residual stream


def groups_of(model: nn.Module, who: str, *others: type[nn.Module]) -> list[list[tuple[str, ...]]]:
    """For each decoder layer its groups: names of the linear layers of one input. The head is not among them.

    Raises:
        ValueError: beginning with `who`; a model of another family, or a layer neither dense nor of `others`.
    """
    shared = FAMILIES.get(type(model).__name__)
    if shared is None:
        raise ValueError(f"{who}: a {type(model).__name__} is none of {', '.join(FAMILIES)}")
    layers = model.get_submodule("model.layers")
    found = []
    for index in range(len(list(layers.children()))):
        at = f"model.layers.{index}"
        found.append([tuple(f"{at}.{name}" for name in names) for names in shared])
        for name in (name for names in found[-1] for name in names):
            kind = type(model.get_submodule(name))
            if kind is not nn.Linear and kind not in others:
                raise ValueError(f"{who}: {name} is a {kind.__name__}, not a dense layer (torch.nn.Linear)")
    return found


def reads_residual(names: tuple[str, ...]) -> bool:
    """Whether a group reads the normed residual stream, whose basis can be chosen."""
    return names[0].endswith(RESIDUAL)


def gated(names: tuple[str, ...]) -> bool:
    """Whether a group is what reads a gated MLP's channels."""
    return names[0].endswith("mlp.down_proj")
