"""Readers against golden files bit for bit, writers against readers, and words for files that do not fit."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scrimp import Int4Weight
from scrimp.int4_weight import GgufFile, open_checkpoint, save_checkpoint, save_gptq
from scrimp.testing import random_int4_weight
from scrimp.testing.int4 import KINDS

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "int4"
SCRIPTS = sorted(GOLDEN.glob("make_*.py"))
CASES = sorted(
    path.stem
    for path in GOLDEN.glob("*.safetensors")
    if path.stem.startswith(("gptq", "awq", "ct")) and "." not in path.stem
)


def stored_config(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def in_input_order(weight: Int4Weight) -> Tensor:
    order = torch.arange(weight.columns) if weight.permutation is None else weight.permutation.long().argsort()
    return weight.codes()[:, order]


def test_golden_files_are_small() -> None:
    assert len(SCRIPTS) == 5
    assert max(path.stat().st_size for path in GOLDEN.iterdir() if path.is_file()) <= 64 << 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_make_the_golden_files(script: Path, tmp_path: Path) -> None:
    runpy.run_path(str(script))["make"](tmp_path)
    made = sorted(tmp_path.iterdir())
    assert made
    for path in made:
        if path.suffix == ".gguf":
            assert path.read_bytes() == (GOLDEN / path.name).read_bytes()
            continue
        new, old = load_file(path), load_file(GOLDEN / path.name)
        assert new.keys() == old.keys()
        assert all(torch.equal(new[name], old[name]) for name in new)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    path = GOLDEN / f"{case}.safetensors"
    checkpoint, expected = (
        open_checkpoint(path, stored_config(path)),
        load_file(GOLDEN / f"{case}.expected.safetensors"),
    )
    assert checkpoint.weights == ("m",)
    weight = checkpoint.weight("m")
    assert torch.equal(in_input_order(weight), expected["codes"])
    assert torch.equal(weight.dequantize(), expected["weight"])
    assert checkpoint.plain == (("m.bias",) if case == "awq" or case.startswith("awq_") else ())


def test_golden_groups() -> None:
    def weight(case: str) -> Int4Weight:
        path = GOLDEN / f"{case}.safetensors"
        return open_checkpoint(path, stored_config(path)).weight("m")

    assert weight("gptq_v1").zero_kind == "uint8"
    assert weight("gptq_v1_desc_act").zero_kind == "none8"
    assert weight("gptq_v1_desc_act").permutation is not None
    assert weight("gptq_v2_ragged").group_size == 32
    assert weight("gptq_v2_ragged_desc_act").group_size == 16
    assert weight("gptq_v2_channel").group_size == 40
    assert weight("ct_tensor").group_size == 48
    assert weight("ct").scales.dtype == torch.bfloat16


def test_golden_gguf() -> None:
    file, expected = open_checkpoint(GOLDEN / "blocks.gguf"), load_file(GOLDEN / "blocks.expected.safetensors")
    assert isinstance(file, GgufFile)
    assert file.weights == ("a.q4_0", "b.q4_1", "c.q8_0")
    assert file.plain == ("d.f32", "e.f16", "f.bf16")
    assert file.other == {"g.q6_k": 14}
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["flag"] is True
    assert file.metadata["epsilon"] == 0.5
    for name in file.weights:
        assert torch.equal(file.weight(name).validate().dequantize(), expected[name]), name
    for name in file.plain:
        assert torch.equal(file.tensor(name).float(), expected[name]), name
    assert [file.weight(name).zero_kind for name in file.weights] == ["none8", "offset", "uint8"]
    assert file.weight("c.q8_0").scales.dtype == torch.float32  # 16 d is above fp16's range
    packed = [file.weight(name).qweight.shape for name in file.weights]
    assert packed == [(6, 48), (6, 48), (6, 96)]
    with pytest.raises(ValueError, match=r"blocks.gguf: tensor 'g.q6_k': ggml type 14; Q4_0"):
        file.weight("g.q6_k")
    with pytest.raises(ValueError, match=r"tensor 'd.f32': F32 \[5\] is no packed matrix"):
        file.weight("d.f32")
    with pytest.raises(ValueError, match=r"tensor 'a.q4_0': Q4_0 is packed; read it with weight\(\)"):
        file.tensor("a.q4_0")
    with pytest.raises(ValueError, match="tensor 'z': missing"):
        file.tensor("z")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_agrees_with_the_gguf_package(kind: str, tmp_path: Path) -> None:
    import gguf

    matrix = torch.randn(7, 160).numpy()
    quantized = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    writer.add_tensor("blk.0.attn_q.weight", quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = open_checkpoint(tmp_path / "x.gguf").weight("blk.0.attn_q.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(weight.dequantize(), expected)
    assert weight.scales.dtype == torch.float16


def test_golden_own_format() -> None:
    checkpoint, expected = (
        open_checkpoint(GOLDEN / "scrimp_v1.safetensors"),
        load_file(GOLDEN / "scrimp_v1.expected.safetensors"),
    )
    assert checkpoint.weights == tuple(sorted(expected))
    assert checkpoint.plain == ("norm.weight",)
    assert torch.equal(checkpoint.tensor("norm.weight"), torch.ones(3))
    for name in checkpoint.weights:
        assert torch.equal(checkpoint.weight(name).dequantize(), expected[name]), name


def test_own_format_round_trip(tmp_path: Path) -> None:
    weights = {f"{kind}.{p}": random_int4_weight(5, 96, 32, kind, permuted=p) for kind in KINDS for p in (False, True)}
    weights["channel"] = random_int4_weight(3, 70, 70)
    weights["eight bits"] = open_checkpoint(GOLDEN / "blocks.gguf").weight("c.q8_0")
    save_checkpoint(tmp_path / "w.safetensors", weights, {"bias": torch.ones(2).bfloat16()})
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    assert checkpoint.weights == tuple(sorted(weights))
    assert checkpoint.plain == ("bias",)
    for name, weight in weights.items():
        again = checkpoint.weight(name)
        assert repr(again) == repr(weight)
        assert torch.equal(again.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match=r"the name 'a.scales' is taken twice"):
        save_checkpoint(tmp_path / "w.safetensors", {"a": weights["channel"]}, {"a.scales": torch.ones(1)})


@pytest.mark.parametrize("kind", ["none8", "uint8"])
@pytest.mark.parametrize("permuted", [False, True], ids=["plain", "permuted"])
def test_gptq_round_trip(kind: str, permuted: bool, tmp_path: Path) -> None:
    weights = {f"model.{g}": random_int4_weight(16, 128, g, kind, permuted=permuted) for g in (16, 32, 64, 128)}
    config = save_gptq(tmp_path, weights, {"model.16.bias": torch.ones(16)})
    assert config["group_size"] == 16
    assert (config["desc_act"], config["sym"]) == (permuted, kind == "none8")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights == tuple(sorted(weights))
    assert checkpoint.plain == ("model.16.bias",)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.weight(name).dequantize(), weight.dequantize())


def test_gptq_writes_what_the_golden_unpacker_reads(tmp_path: Path) -> None:
    unpack: Callable[..., Any] = runpy.run_path(str(GOLDEN / "make_gptq.py"))["unpack"]
    for number, weight in enumerate(
        (random_int4_weight(8, 64, 32, "uint8", permuted=True), random_int4_weight(8, 72, 72))
    ):
        config = save_gptq(tmp_path, {"m": weight})
        assert config["group_size"] == (32, -1)[number]
        tensors = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
        assert torch.equal(torch.from_numpy(unpack(tensors, 2)[1]), weight.dequantize())


def test_gptq_writer_refuses_what_the_format_cannot_say(tmp_path: Path) -> None:
    base = random_int4_weight(8, 64, 32, "uint8", dtype=torch.float32)
    zeros = torch.full((8, 2), 16, dtype=torch.uint8)
    cases = {
        "float": (random_int4_weight(8, 64, kind="float"), "m has float; the format has integer zeros only"),
        "codebook": (random_int4_weight(8, 64, kind="codebook"), "m has a codebook; the format"),
        "odd": (random_int4_weight(7, 64), "m is 7 x 64; the format packs multiples of 8"),
        "scales": (base, "m has the scale .*, which fp16 cannot hold"),
        "zeros": (Int4Weight(base.qweight, base.scales.half(), zeros, None, None, 32, "uint8"), "m has the zero 16"),
        "eight bits": (open_checkpoint(GOLDEN / "blocks.gguf").weight("c.q8_0"), "m has 192 columns for 96 inputs"),
    }
    for weight, words in cases.values():
        with pytest.raises(ValueError, match=words):
            save_gptq(tmp_path, {"m": weight})
    with pytest.raises(ValueError, match="there is no weight to write"):
        save_gptq(tmp_path, {})
    with pytest.raises(ValueError, match="b has groups of 48, not a multiple of 32"):
        save_gptq(tmp_path, {"a": random_int4_weight(8, 64, 32), "b": random_int4_weight(8, 48, 48)})


def test_a_folder_of_shards(tmp_path: Path) -> None:
    for index in range(2):
        tensors = load_file(GOLDEN / "gptq_v2.safetensors")
        save_file({f"{index}.{name}": t for name, t in tensors.items()}, tmp_path / f"{index}.safetensors")
    names = {f"{i}.m.{part}": f"{i}.safetensors" for i in range(2) for part in ("qweight", "scales")}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "checkpoint_format": "gptq_v2", "group_size": 16})
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights == ("0.m", "1.m")
    expected = load_file(GOLDEN / "gptq_v2.expected.safetensors")["weight"]
    assert torch.equal(checkpoint.weight("1.m").dequantize(), expected)
    # HF shards cut between any two tensors, also inside a module
    tensors = load_file(GOLDEN / "gptq_v2.safetensors")
    save_file({"m.qweight": tensors.pop("m.qweight")}, tmp_path / "0.safetensors")
    save_file(tensors, tmp_path / "1.safetensors")
    assert torch.equal(open_checkpoint(tmp_path).weight("m").dequantize(), expected)
    save_file(tensors | {"m.qweight": torch.zeros(1)}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=r"1.safetensors: tensor 'm.qweight': it is also in 0.safetensors"):
        open_checkpoint(tmp_path)
    for bad in ("../0.safetensors", "/etc/passwd", "sub/0.safetensors", "0.bin"):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(ValueError, match="is not a safetensors file beside it"):
            open_checkpoint(tmp_path)
    for text in ("[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{", "\udcff", "[" * 100000):
        index.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"model.safetensors.index.json: ('weight_map'|not JSON)"):
            open_checkpoint(tmp_path)


def test_an_uninitialised_order_counts_as_none(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "ct.safetensors")
    save_file(tensors | {"m.weight_g_idx": torch.full((128,), -1).int()}, tmp_path / "x.safetensors")
    weight = open_checkpoint(tmp_path / "x.safetensors", stored_config(GOLDEN / "ct.safetensors")).weight("m")
    assert weight.permutation is None
    assert torch.equal(weight.dequantize(), load_file(GOLDEN / "ct.expected.safetensors")["weight"])


def test_unknown_names() -> None:
    checkpoint = open_checkpoint(GOLDEN / "scrimp_v1.safetensors")
    with pytest.raises(ValueError, match=r"scrimp_v1.safetensors: there is no 4-bit weight 'm'"):
        checkpoint.weight("m")
    with pytest.raises(ValueError, match=r"scrimp_v1\.safetensors: tensor 'm': missing"):
        checkpoint.tensor("m")
