"""Checkpoints of 4-bit weights on disk: one face for every format, one weight in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from . import awq, compressed_tensors, gptq
from .gguf import GgufFile
from .tensor_file import TensorFiles, read_json
from .weight import FORMAT_VERSION, Int4Weight

FORMAT = "scrimp.int4"
_OWN = ("qweight", "scales", "zeros", "codebook", "permutation", "format")
_SUFFIXES = {
    "gptq": gptq.SUFFIXES,
    "awq": awq.SUFFIXES,
    "compressed-tensors": compressed_tensors.SUFFIXES,
    "scrimp": _OWN,
}


class Int4Checkpoint(Protocol):
    """What `open_checkpoint` returns: names, and tensors that are read when asked for."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the 4-bit matrices: modules, or tensors of a GGUF file."""

    @property
    def plain(self) -> tuple[str, ...]:
        """Names of the ordinary tensors."""

    def weight(self, name: str) -> Int4Weight:
        """A 4-bit matrix, validated."""

    def tensor(self, name: str) -> Tensor:
        """An ordinary tensor."""


@dataclass(frozen=True)
class TensorCheckpoint:
    """4-bit weights in one or several safetensors files."""

    path: Path
    method: str
    config: Mapping[str, Any]
    files: TensorFiles
    weights: tuple[str, ...]
    plain: tuple[str, ...]

    def weight(self, name: str) -> Int4Weight:
        """A 4-bit matrix, validated.

        Raises: ValueError naming file, tensor and value for whatever is missing or does not fit.
        """
        if name not in self.weights:
            raise ValueError(f"{self.path}: there is no 4-bit weight {name!r}")
        if self.method == "scrimp":
            parts = [f"{name}.{part}" for part in _OWN if f"{name}.{part}" in self.files.layout]
            return Int4Weight.from_state_dict(
                {part: self.files.read(part) for part in parts}, f"{name}.", f"{self.path}"
            )
        read = {"gptq": gptq.read, "awq": awq.read, "compressed-tensors": compressed_tensors.read}[self.method]
        return read(self.files, name, self.config)

    def tensor(self, name: str) -> Tensor:
        """An ordinary tensor."""
        return self.files.read(name)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, from its index where it has one."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    content = read_json(index)
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ValueError(f"{index}: 'weight_map' must be an object of file names")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not a safetensors file beside it")
    return [path / name for name in names]


def quantization_config(path: str | Path) -> dict[str, Any] | None:
    """The quantization_config of a model folder, from config.json, quantize_config.json or quant_config.json."""
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        file = Path(path) / name
        if not file.exists():
            continue
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: must be a JSON object, not {type(content).__name__}")
        config = content.get("quantization_config") if name == "config.json" else content
        if config is None:
            continue
        if not isinstance(config, dict):
            raise ValueError(f"{file}: quantization_config={config!r} must be an object")
        return config
    return None


def _method(path: Path, config: Mapping[str, Any]) -> str:
    method = config.get("quant_method", "awq" if "w_bit" in config else "gptq")
    if method not in ("gptq", "awq", "compressed-tensors", "scrimp"):
        raise ValueError(f"{path}: quant_method={method!r}; gptq, awq, compressed-tensors and scrimp are read")
    try:
        {"gptq": gptq.version, "awq": awq.check, "compressed-tensors": compressed_tensors.check}.get(
            method, lambda config: None
        )(config)
    except ValueError as error:
        raise ValueError(f"{path}: quantization_config: {error}") from error
    return method


def open_checkpoint(path: str | Path, config: Mapping[str, Any] | None = None) -> Int4Checkpoint:
    """Opens 4-bit weights: a model folder, a .safetensors file or a .gguf file.

    Reads headers only. GPTQ (1 and 2, desc_act), AWQ (gemm), compressed-tensors (pack-quantized), GGUF (Q4_0, Q4_1,
    Q8_0) and files of `save_checkpoint`; all map to `Int4Weight` without changing a bit of any weight's value.

    Args:
        path: folder, or file.
        config: quantization_config of a safetensors file that has no folder around it (`quant_method` and what the
            format needs); by default that of the folder's config.json.

    Raises:
        ValueError: a file that is missing, damaged or in a layout that is not read; file, tensor and value are named.

    >>> import tempfile, torch, scrimp
    >>> from scrimp.int4_weight import open_checkpoint, save_checkpoint
    >>> weight = scrimp.Int4Weight.from_codes(torch.ones(2, 32).int(), torch.ones(2, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/my.safetensors", {"layer": weight})
    ...     open_checkpoint(f"{folder}/my.safetensors").weight("layer")
    Int4Weight(N=2, K=32, group_size=32, none8, scales=float32)
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if path.suffix == ".gguf":
        return GgufFile(path)
    files = TensorFiles(path, _files(path) if path.is_dir() else [path])
    if config is None and FORMAT in files.metadata:
        config = _own_header(files)
    if config is None:
        config = quantization_config(path if path.is_dir() else path.parent)
    if config is None:
        raise ValueError(f"{path}: there is no quantization_config that says what the tensors mean")
    method = _method(path, config)
    find = {"compressed-tensors": compressed_tensors.modules}.get(method, gptq.modules)
    weights = tuple(sorted(find(files.layout)))
    packed = {f"{name}.{suffix}" for name in weights for suffix in _SUFFIXES[method]}
    return TensorCheckpoint(path, method, config, files, weights, tuple(sorted(set(files.layout) - packed)))


def _own_header(files: TensorFiles) -> dict[str, Any]:
    try:
        header = json.loads(files.metadata[FORMAT])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{files.path}: the {FORMAT} header is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("version") != FORMAT_VERSION:
        version = header.get("version") if isinstance(header, dict) else header
        raise ValueError(f"{files.path}: {FORMAT} version {version!r}; this scrimp reads {FORMAT_VERSION}")
    return {"quant_method": "scrimp"}


def save_checkpoint(
    path: str | Path, weights: Mapping[str, Int4Weight], plain: Mapping[str, Tensor] | None = None
) -> None:
    """Writes weights of every kind to a safetensors file: `<name>.qweight` and its companions, canonical layout.

    Args:
        path: file to write.
        weights: name -> weight.
        plain: name -> ordinary tensor, written as it is.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in (plain or {}).items()}
    for name, weight in weights.items():
        state = {key: value.contiguous() for key, value in weight.state_dict(f"{name}.").items()}
        if taken := sorted(set(state) & set(tensors)):
            raise ValueError(f"{path}: the name {taken[0]!r} is taken twice")
        tensors |= state
    header = json.dumps({"version": FORMAT_VERSION})
    save_file(tensors, path, metadata={FORMAT: header, "format": "pt"})
