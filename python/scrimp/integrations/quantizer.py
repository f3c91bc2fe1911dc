"""4-bit models in Hugging Face transformers: `save_pretrained`, `from_pretrained` and checkpoints of other makers.

    report = scrimp.quantize(model, "gptq", 64, tokens)
    model.save_pretrained("folder")
    model, tokenizer = scrimp.load("folder")        # or a folder of a GPTQ, AWQ or compressed-tensors model

Importing this module makes the quantization method "scrimp" known to transformers, so that
`AutoModelForCausalLM.from_pretrained("folder")` works too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..int4_weight import Int4Weight, open_checkpoint, quantization_config
from ..methods.int4.layout import describe, describe_model, make_room
from ..methods.int4.linear import int4_layers
from ..ops.int4_linear import MODES

NAME = "scrimp"


@register_quantization_config(NAME)
class ScrimpConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model with 4-bit layers.

    Args:
        version: of this description.
        mode: arithmetic of the layers, "exact" or "int8".
        layouts: which layers have which groups, zeros and types.
    """

    def __init__(self, version: int = 0, mode: str = "exact", layouts: Any = (), **_: Any) -> None:
        if mode not in MODES:
            raise ValueError(f"quantization_config: mode={mode!r} must be one of {', '.join(MODES)}")
        self.quant_method = NAME
        self.version, self.mode, self.layouts = version, mode, list(layouts)


@register_quantizer(NAME)
class ScrimpQuantizer(HfQuantizer):
    """Loads and saves models whose layers `scrimp.quantize` made; it does not quantize while loading."""

    requires_calibration = True
    quantization_config: ScrimpConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        make_room(model, self.quantization_config.to_dict())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, layer in int4_layers(model):
            layer.refresh(f"{model.name_or_path or type(model).__name__}: {name}")
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def load(path: str | Path, *, dtype: torch.dtype | str = "auto", mode: str | None = None) -> PreTrainedModel:
    """A causal language model from a folder of 4-bit weights: scrimp's own, GPTQ, AWQ or compressed-tensors.

    Weights stay 4-bit and keep their values to the bit; nothing of the producers' packages is needed.

    Args:
        path: folder with config.json and safetensors files.
        dtype: of everything else; "auto" as the checkpoint says.
        mode: "exact" or "int8"; by default what the checkpoint says, else "exact".

    Raises:
        ValueError: files that are damaged or in a layout that is not read, tensors that are missing.
    """
    path = Path(path)
    if mode is not None and mode not in MODES:
        raise ValueError(f"load: mode={mode!r} must be one of {', '.join(MODES)}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: there is no config.json; a model folder is needed")
    checkpoint: Any = open_checkpoint(path)  # checks the headers of all files
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if (quantization_config(path) or {}).get("quant_method") != NAME:
        weights = {name: checkpoint.weight(name) for name in checkpoint.weights}
        plain = {name: checkpoint.tensor(name) for name in checkpoint.plain}
        return from_weights(path, config, weights, plain, dtype, mode)
    ScrimpConfig(**config.quantization_config)  # checks
    _check_shapes(path, config, {name: shape for name, (_, shape) in checkpoint.files.layout.items()})
    return _ready(AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True), mode)


def from_weights(
    path: Path,
    config: Any,
    weights: Mapping[str, Int4Weight],
    plain: Mapping[str, Tensor],
    dtype: torch.dtype | str = "auto",
    mode: str | None = None,
) -> PreTrainedModel:
    """A causal language model made of what a reader has read.

    Args:
        path: of the files, for messages.
        config: of transformers; it gets the description of the 4-bit layers.
        weights: module -> weight.
        plain: parameter -> tensor; biases of 4-bit layers are among them.
        dtype: of everything else; "auto" as `config` says.
        mode: "exact" (the default) or "int8".

    Raises:
        ValueError: tensors that are missing, or of another shape than `config` says.
    """
    state = dict(plain)
    for name, weight in weights.items():
        state |= weight.state_dict(f"{name}.")
    config.quantization_config = describe({name: (weight, f"{name}.bias" in plain) for name, weight in weights.items()})
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    _check_shapes(path, config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return _ready(_class_of(path, config).from_pretrained(None, config=config, state_dict=state, dtype=dtype), mode)


def _class_of(path: Path, config: Any) -> Any:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{path}: model_type={config.model_type!r} is no causal language model of transformers")
    return AutoModelForCausalLM._model_mapping[type(config)]


def _check_shapes(path: Path, config: Any, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the tensors `found` are what a model of `config` needs; allocates nothing."""
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(found):
        raise ValueError(f"{path}: num_hidden_layers={layers!r}, but there are {len(found)} tensors")
    kind = _class_of(path, config)
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # whatever a configuration that makes no sense breaks inside transformers
        raise ValueError(f"{path}: transformers cannot make a {kind.__name__} of its configuration: {error}") from error
    make_room(model, config.quantization_config)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in needed.items():
        if name not in found and name not in tied:
            raise ValueError(f"{path}: there is no tensor {name!r}")
        if found.get(name, shape) != shape:
            raise ValueError(f"{path}: tensor {name!r}: shape {list(found[name])}, but its model needs {list(shape)}")


def _ready(model: PreTrainedModel, mode: str | None) -> PreTrainedModel:
    for _, layer in int4_layers(model):
        layer.mode = mode or layer.mode
    return model.requires_grad_(False).eval()


def prepare_to_save(model: PreTrainedModel) -> None:
    """Writes the 4-bit layers into `model.config`, as `scrimp.quantize` does; call it after changing layers by hand."""
    model.config.quantization_config = describe_model(model)
