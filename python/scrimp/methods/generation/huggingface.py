"""A Hugging Face model as a DecoderModel: its own parameters, nothing copied; what is not understood is refused.

transformers is not imported here: the classes are told by their names and the modules that define them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .linear import fuse, is_linear
from .model import DecoderLayer, DecoderModel, Norm, Positions

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ACTIVATION_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
OBSERVERS = "transformers.utils.output_capturing"  # its hooks stay after output_hidden_states and change nothing
DTYPES = (torch.float32, torch.bfloat16)
SUPPORTED = "Llama (SmolLM2 among them), Mistral, Qwen2 and Qwen3 for causal language modelling, in fp32 or bf16"

_positions: WeakKeyDictionary[nn.Module, tuple[Tensor, Positions]] = WeakKeyDictionary()


class UnsupportedModelError(ValueError):
    """The decoding loop would not compute what this model computes; the text says why and what it can run."""

    def __init__(self, model: object, reason: str) -> None:
        super().__init__(f"the decoding loop cannot run this {type(model).__name__}: {reason}. It runs {SUPPORTED}")


def decoder_model(model: nn.Module | DecoderModel) -> DecoderModel:
    """The view of a Hugging Face model that the decoding loop runs; cheap, and made anew for each call.

    Raises:
        UnsupportedModelError: a class, module, hook, rope type, dtype or setting that the loop does not compute.
    """
    if isinstance(model, DecoderModel):
        return model
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if type(model).__name__ != CLASSES.get(str(family)) or type(model).__module__ != _module_of(str(family)):
        where = type(model).__module__
        raise UnsupportedModelError(model, f"its model type is {family!r} and its class is of {where}")
    modules = dict(model.named_modules())
    tensors = _tensors(modules.values())
    for reason in _faults(model, modules, tensors):
        raise UnsupportedModelError(model, reason)
    base: Any = model.model
    attention = base.layers[0].self_attn
    view = DecoderModel(
        name=str(getattr(config, "name_or_path", "") or type(model).__name__),
        embedding=base.embed_tokens.weight,
        layers=tuple(_layer(layer, config) for layer in base.layers[: config.num_hidden_layers]),  # type: ignore[union-attr]
        norm=_norm(base.norm),
        head=fuse([model.lm_head]),  # type: ignore[list-item]
        activation=activation_of(base.layers[0].mlp.act_fn),  # type: ignore[arg-type]
        positions=_rotary(base.rotary_emb),
        heads=config.num_attention_heads,  # type: ignore[union-attr]
        kv_heads=config.num_key_value_heads,  # type: ignore[union-attr]
        head_dim=attention.head_dim,
        scale=float(attention.scaling),
        context=int(config.max_position_embeddings),  # type: ignore[union-attr]
        eos=_eos(model),
        weights=tuple((t, t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors),
    )
    H, G, D = view.heads, view.kv_heads, view.head_dim
    for layer in view.layers:
        sizes = (*layer.qkv.sizes, *layer.gate_up.sizes)
        if sizes[:3] != (H * D, G * D, G * D) or sizes[3] != sizes[4]:
            raise UnsupportedModelError(model, f"its projections give {sizes} numbers, for {H} and {G} heads of {D}")
    return view


def _module_of(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def _faults(model: nn.Module, modules: dict[str, nn.Module], tensors: list[Tensor]) -> Iterator[str]:
    """Reasons not to run the model, the first one counts."""
    config: Any = model.config
    base: Any = model.model
    own = (_module_of(config.model_type), "transformers.activations", "torch.nn.modules")
    for name, module in modules.items():
        if not (is_linear(module) or type(module).__module__.startswith(own)):
            yield f"its module {name!r} is a {type(module).__module__}.{type(module).__name__}"
        if "forward" in module.__dict__:
            yield f"the forward of its module {name!r} has been replaced"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", "") != OBSERVERS for hook in hooks):
            yield f"its module {name!r} has forward hooks, which the loop would not call"
    if {type(tensor) for tensor in tensors} - {Tensor, nn.Parameter, nn.Buffer}:
        yield f"it holds tensors of type {sorted({type(t).__name__ for t in tensors})}"
    if any(type(tensor.data) is not Tensor for tensor in tensors):
        yield "some of its parameters are of a subclass of torch.Tensor"
    floats = {t.dtype for t in tensors if isinstance(t, nn.Parameter) and t.is_floating_point()}
    if len(floats) != 1 or not floats <= set(DTYPES):
        yield f"its parameters are {' and '.join(sorted(str(d).removeprefix('torch.') for d in floats))}"
    if len({tensor.device for tensor in tensors}) != 1 or tensors[0].is_meta:
        yield f"its parameters are on {' and '.join(sorted({str(t.device) for t in tensors}))}"
    if getattr(base.rotary_emb, "rope_type", None) not in STATIC_ROPE:
        rope = getattr(base.rotary_emb, "rope_type", None)
        yield f"rope type {rope!r} is not one of {', '.join(STATIC_ROPE)}"
    if not base.layers:
        yield "it has no layers"
    yield from _layer_faults(base.layers)
    for option in ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "residual_multiplier"):
        if getattr(config, option, None) not in (None, 1.0):
            yield f"it has {option}={getattr(config, option)}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        yield "its attention is not causal"
    known = {"full_attention", "sliding_attention"}
    if set(getattr(config, "layer_types", None) or known) - known:
        yield f"its layers are of types {sorted(set(config.layer_types))}"


def _layer_faults(layers: Any) -> Iterator[str]:
    first = layers[0]
    for layer in layers:
        if activation_of(layer.mlp.act_fn) is None or type(layer.mlp.act_fn) is not type(first.mlp.act_fn):
            yield f"its activation {type(layer.mlp.act_fn).__name__} is not SiLU or GELU, or not alike in all layers"
        kinds = [(each.self_attn.head_dim, each.self_attn.scaling) for each in (layer, first)]
        if kinds[0] != kinds[1]:
            yield f"its layers have heads of several kinds: {kinds}"


def activation_of(module: nn.Module) -> str | None:
    """As `scrimp.ops.decoder_layers` names it; None for one that is neither SiLU nor GELU."""
    return ACTIVATION_NAMES.get(type(module).__name__)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))


def _layer(layer: Any, config: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return DecoderLayer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=_norm(attention.q_norm) if normed else None,
        k_norm=_norm(attention.k_norm) if normed else None,
        o=fuse([attention.o_proj]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=fuse([mlp.gate_proj, mlp.up_proj]),
        down=fuse([mlp.down_proj]),
        window=_window(config, int(attention.layer_idx)),
    )


def _window(config: Any, index: int) -> int:
    """Mistral's window holds in every layer; where layers have types, in those that say so."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or (types is not None and types[index] != "sliding_attention"):
        return 0
    return int(window)


def _rotary(module: Any) -> Positions:
    """The tables of a rotary module, kept while it lives and its frequencies stay what they are."""
    known = _positions.get(module)
    if known is None or known[0].shape != module.inv_freq.shape or not torch.equal(known[0], module.inv_freq):
        own = copy.deepcopy(module)  # the key must not be kept alive by its value

        def compute(positions: Tensor) -> tuple[Tensor, Tensor]:
            like = torch.empty(0, dtype=torch.float32, device=own.inv_freq.device)
            cos, sin = own(like, positions[None].to(like.device))
            return cos[0], sin[0]

        known = _positions[module] = (own.inv_freq, Positions(compute))
    return known[1]


def _eos(model: nn.Module) -> tuple[int, ...]:
    """Ids of the generation settings, else of the configuration."""
    for settings in (getattr(model, "generation_config", None), model.config):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            return (int(ids),) if isinstance(ids, int) else tuple(int(i) for i in ids)
    return ()
