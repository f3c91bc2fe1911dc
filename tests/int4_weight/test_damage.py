"""Files that nobody vouches for: each kind of damage has its words, and no flipped byte raises anything else."""

import json
import math
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scrimp.int4_weight import Int4Checkpoint, open_checkpoint, quantization_config
from scrimp.int4_weight.tensor_file import TensorFiles
from scrimp.ops import int4_linear

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "int4"


def stored_config(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: there is no such file or folder"):
        open_checkpoint(tmp_path / "x")
    with pytest.raises(ValueError, match=r"model.safetensors: there is no such file"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="there is no quantization_config that says what the tensors mean"):
        open_checkpoint(tmp_path)
    assert quantization_config(tmp_path) is None
    (tmp_path / "config.json").write_text('{"quantization_config": []}')
    with pytest.raises(ValueError, match=r"quantization_config=\[\] must be an object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(ValueError, match="must be a JSON object, not int"):
        open_checkpoint(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match="bytes are too many for JSON"):
        open_checkpoint(tmp_path)


CT_WEIGHTS = {"num_bits": 4, "type": "int"}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "hqq"}, "quant_method='hqq'; gptq, awq, compressed-tensors and scrimp are read"),
    "gptq bits": ({"quant_method": "gptq", "bits": 8}, "bits=8: only 4-bit weights are read"),
    "gptq words": ({"quant_method": "gptq", "pack_dtype": "int16"}, "pack_dtype='int16': only int32 is read"),
    "gptq marlin": ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format='marlin': only gptq"),
    "old marlin": ({"quant_method": "gptq", "is_marlin_format": True}, "the Marlin layout is not read"),
    "awq bits": ({"quant_method": "awq", "bits": 3}, "bits=3: only 4-bit weights are read"),
    "awq gemv": ({"quant_method": "awq", "version": "gemv"}, "version='gemv': only the gemm layout is read"),
    "ct empty": ({"quant_method": "compressed-tensors"}, "config_groups=None names no group"),
    "ct group": ({"quant_method": "compressed-tensors", "config_groups": {"g": 1}}, r"config_groups\['g'\] has no 'w"),
    "ct format": (
        {"quant_method": "compressed-tensors", "format": "nvfp4", "config_groups": {"g": {"weights": CT_WEIGHTS}}},
        r"format='nvfp4' of config_groups\['g'\]: only pack-quantized is read",
    ),
    "ct bits": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"weights": CT_WEIGHTS | {"num_bits": 8}}},
        },
        r"config_groups\['g'\] has 8 bits of type 'int'",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config(case: str) -> None:
    config, words = CONFIGS[case]
    with pytest.raises(ValueError, match=words):
        open_checkpoint(GOLDEN / "gptq_v2.safetensors", config)


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[1, 0] = value
        return tensor

    return change


# file, tensor, change (None: left out), words
DAMAGE: dict[str, tuple[str, str, Callable[[Tensor], Tensor] | None, str]] = {
    "gptq nan": ("gptq_v2", "scales", poison(math.nan), r"tensor 'm.scales': element \[1, 0\] is nan"),
    "gptq inf": ("gptq_v1", "scales", poison(-math.inf), r"tensor 'm.scales': element \[1, 0\] is -inf"),
    "gptq scales": ("gptq_v2", "scales", lambda t: t[:, 1:].clone(), r"m.scales': shape \[4, 39\], expected \[4, 40\]"),
    "gptq qzeros": ("gptq_v2", "qzeros", lambda t: t.short(), "'m.qzeros': type I16; it must be int32"),
    "gptq no zeros": ("gptq_v2", "qzeros", None, "'m.qzeros': missing"),
    "gptq bits": ("gptq_v2", "qweight", lambda t: t.repeat(2, 1), "are 128 rows of 4 bits, but g_idx has 64"),
    "gptq rank": ("gptq_v2", "qweight", lambda t: t[0].clone(), r"'m.qweight': shape \[40\], expected 2 dimensions"),
    "gptq empty": ("gptq_v2", "qweight", lambda t: t[:0].clone(), r"'m.qweight': shape \[0, 40\], expected 2"),
    "gptq group": ("gptq_v2", "g_idx", lambda t: t - 1, "'m.g_idx': column 0 is in group -1, but there are 4 groups"),
    "gptq large": ("gptq_v2", "g_idx", lambda t: t + 2**30, "'m.g_idx': column 0 is in group 1073741824"),
    "gptq sizes": ("gptq_v2", "g_idx", lambda t: (torch.arange(64) > 0).int(), "cannot be cut"),
    "awq nan": ("awq", "scales", poison(math.nan), r"'m.scales': element \[1, 0\] is nan"),
    "awq groups": ("awq", "scales", lambda t: t.repeat(30, 1), "'m.scales': 60 groups do not divide 64 rows"),
    "awq zeros": ("awq", "qzeros", lambda t: t.repeat(1, 2), r"'m.qzeros': shape \[2, 6\], expected \[2, 3\]"),
    "ct inf": ("ct", "weight_scale", poison(math.inf), r"'m.weight_scale': element \[1, 0\] is inf"),
    "ct shape": ("ct", "weight_shape", lambda t: t * 2**40, r"'m.weight_packed': .* cannot hold the 13194139533312 x"),
    "ct negative": ("ct", "weight_shape", lambda t: -t, r"'m.weight_packed': .* cannot hold the -12 x -128"),
    "ct no shape": ("ct", "weight_shape", None, "'m.weight_shape': missing"),
    "ct no scale": ("ct", "weight_scale", None, "'m.weight_scale': missing"),
    "ct zeros": ("ct_asymmetric_int8", "weight_zero_point", lambda t: t * 0 + 9, "weight_zero_point': values from 9"),
    "ct g_idx": ("ct_actorder", "weight_g_idx", lambda t: t + 1, "'m.weight_g_idx': column .* is in group 4, but"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensor(case: str, tmp_path: Path) -> None:
    source, tensor, change, words = DAMAGE[case]
    tensors = load_file(GOLDEN / f"{source}.safetensors")
    old = tensors.pop(f"m.{tensor}")
    if change is not None:
        tensors[f"m.{tensor}"] = change(old)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=words) as caught:
        open_checkpoint(path, stored_config(GOLDEN / f"{source}.safetensors")).weight("m")
    assert str(caught.value).startswith(f"{path}: tensor 'm.")


def test_own_format_errors(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "scrimp_v1.safetensors")
    path = tmp_path / "w.safetensors"
    for header, words in (
        ("{", "header is not JSON"),
        ('{"version": 2}', "scrimp.int4 version 2; this scrimp reads 1"),
    ):
        save_file(tensors, path, {"scrimp.int4": header})
        with pytest.raises(ValueError, match=words):
            open_checkpoint(path)
    for name, value, words in (
        ("none8.scales", torch.full((5, 2), torch.inf), r"w.safetensors: none8: scales\[0, 0\] is inf"),
        ("none8.scales", torch.ones(5, 3), r"w.safetensors: none8: Int4Weight: scales has shape \[5, 3\]"),
        ("uint8.permutation", torch.zeros(64).int(), "uint8: permutation names input 1 of 64 nowhere"),
    ):
        save_file(tensors | {name: value}, path, {"scrimp.int4": '{"version": 1}'})
        with pytest.raises(ValueError, match=words):
            open_checkpoint(path).weight(name.split(".")[0])


MOST_GROWTH_KIB = 512 << 10  # a sanitizer keeps 256 MiB of freed memory
SUBJECTS = ["gptq_v1", "gptq_v2_desc_act", "awq", "ct_asymmetric", "ct_actorder", "scrimp_v1", "blocks"]
ABSURD = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def read_everything(path: Path, config: dict[str, Any] | None) -> int:
    """Bytes of all tensors that the file makes readers hold; whatever is read can be multiplied with."""
    checkpoint: Int4Checkpoint = open_checkpoint(path, config)
    total = 0
    for name in checkpoint.weights:
        weight = checkpoint.weight(name).validate()
        total += weight.bytes() + weight.dequantize().nbytes
        for mode in ("exact", "int8") if weight.codebook is None or weight.codebook.dtype == torch.int8 else ("exact",):
            y = int4_linear(torch.ones(3, weight.in_features), weight, mode=mode)
            assert y.shape == (3, weight.out_features)
    return total + sum(checkpoint.tensor(name).nbytes for name in checkpoint.plain)


def survives(data: bytes, suffix: str, config: dict[str, Any] | None) -> None:
    """Reads `data` as a file: it succeeds within memory that the file's size bounds, or raises a ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzzed{suffix}"
        path.write_bytes(data)
        try:
            held, words = read_everything(path, config), str(path)
        except ValueError as error:
            held, words = 0, str(error)
    assert held <= 32 * len(data)
    assert str(path) in words


def test_numbers_at_odd_bytes_are_moved(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                         "b": {"dtype": "BF16", "shape": [2], "data_offsets": [1, 5]}}).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" + b"\x80\x3f\x00\x40")
    tensor = TensorFiles(path, [path]).read("b")
    assert tensor.tolist() == [1.0, 2.0]
    assert tensor.data_ptr() % 2 == 0


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test of this file may make the process grow by much, whatever the files claim to hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KIB


@pytest.mark.parametrize("subject", SUBJECTS)
def test_any_damage_is_a_value_error(subject: str) -> None:
    suffix = ".gguf" if subject == "blocks" else ".safetensors"
    path = GOLDEN / (subject + suffix)
    whole = path.read_bytes()
    config = None if subject in ("blocks", "scrimp_v1") else stored_config(path)
    head = len(whole) if suffix == ".safetensors" else 600
    places = st.integers(0, len(whole) - 1) | st.integers(0, min(head, len(whole)) - 1)
    flips = st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)
    numbers = st.lists(st.tuples(places, st.sampled_from(ABSURD)), max_size=2)

    @settings(max_examples=120)
    @given(flips=flips, numbers=numbers, cut=st.none() | st.integers(0, len(whole)), tail=st.binary(max_size=9))
    @example(flips=[], numbers=[], cut=None, tail=b"")
    def check(flips: list[tuple[int, int]], numbers: list[tuple[int, int]], cut: int | None, tail: bytes) -> None:
        data = bytearray(whole)
        for at, value in flips:
            data[at] = value
        for at, value in numbers:
            data[at : at + 8] = struct.pack("<Q", value)
        survives(bytes(data[:cut]) + tail, suffix, config)

    check()


@pytest.mark.parametrize("subject", ["gptq_v2_desc_act", "awq", "ct_actorder", "scrimp_v1"])
def test_any_header_is_a_value_error(subject: str) -> None:
    """Headers that are JSON, with other shapes, types and offsets of the same bytes."""
    path = GOLDEN / f"{subject}.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    config = None if subject == "scrimp_v1" else stored_config(path)
    names = sorted(set(header) - {"__metadata__"})
    extents = st.lists(st.integers(0, 200) | st.sampled_from([-1, *ABSURD]), max_size=3)
    types = st.sampled_from(["F32", "F16", "BF16", "I32", "I64", "U8", "I8", "F64", "F8_E4M3", "BOOL", "F4", "?"])

    @settings(max_examples=120)
    @given(name=st.sampled_from(names), shape=st.none() | extents, dtype=st.none() | types, drop=st.booleans())
    def check(name: str, shape: list[int] | None, dtype: str | None, drop: bool) -> None:
        changed = json.loads(json.dumps(header))
        changed[name] |= {} if shape is None else {"shape": shape}
        changed[name] |= {} if dtype is None else {"dtype": dtype}
        if drop and shape is None:
            changed[f"{name}x"] = changed.pop(name)
        text = json.dumps(changed).encode()
        survives(struct.pack("<Q", len(text)) + text + body, ".safetensors", config)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["bits", "w_bit", "group_size", "version", "format", "checkpoint_format", "pack_dtype", "config_groups"]


@settings(max_examples=120)
@given(
    method=st.sampled_from(["gptq", "awq", "compressed-tensors", "scrimp"]) | JSON,
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from([4, "gptq", "gptq_v2", "gemm"]), max_size=3),
    weights=st.none() | st.dictionaries(st.sampled_from(["num_bits", "type"]), JSON | st.sampled_from([4, "int"])),
    subject=st.sampled_from(SUBJECTS[:-1]),
)
def test_any_configuration_is_a_value_error(method: Any, fields: dict, weights: dict | None, subject: str) -> None:
    config = {"quant_method": method, **fields}
    if weights is not None:
        config |= {"config_groups": {"g": {"weights": weights, "format": "pack-quantized"}}}
    survives((GOLDEN / f"{subject}.safetensors").read_bytes(), ".safetensors", config)
