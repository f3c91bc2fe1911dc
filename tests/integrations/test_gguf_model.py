"""GGUF files of whole models: what stays packed, beside transformers' own reading of the same file; damaged files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scrimp.benchmarks.peers.llama import write_gguf
from torch import nn

import scrimp
from scrimp.integrations.gguf_names import transformers_name
from scrimp.methods.int4 import Int4Linear, int4_layers

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None}
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))


def mixed(name: str) -> str:
    """As Q4_0 and Q4_1 files have it: an embedding of 8 bits, some matrices of other types."""
    if not name.endswith(".weight") or "norm" in name:
        return "F32"
    if name.startswith(("token_embd", "output")):
        return "Q8_0"
    return {"attn_v": "Q5_0", "attn_k": "F16", "ffn_up": "Q4_1", "ffn_down": "Q8_0"}.get(name.split(".")[2], "Q4_0")


def written(
    path: Path, tokenizer: Any, family: str = "llama", kind: Callable[[str], str] = mixed, **changes: Any
) -> nn.Module:
    """Writes a random model, and returns it."""
    make_config, make_model = MODELS[family]
    config = make_config(**(SIZES | changes))
    torch.manual_seed(0)
    model = make_model(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    letters = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write_gguf(model, path, [letter for letter, _ in letters], kind)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", MODELS)
def test_packed_weights_are_those_of_the_file(family: str, tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    written(path, tokenizer, family, tie_word_embeddings=tied)
    model, own = scrimp.load(path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    packed = dict(int4_layers(model))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    kinds.setdefault("output.weight", kinds["token_embd.weight"])
    stay = {str(transformers_name(name)) for name, kind in kinds.items() if kind[:2] in ("Q4", "Q8")}
    assert {f"{name}.weight" for name in packed} == stay - {"model.embed_tokens.weight"}
    state = model.state_dict()
    for name, tensor in stock.state_dict().items():
        module = name.removesuffix(".weight")
        assert torch.equal(packed[module].weight.dequantize() if module in packed else state[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, stock(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert own("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
    model.save_pretrained(tmp_path / "ours")
    own.save_pretrained(tmp_path / "ours")
    again, _ = scrimp.load(tmp_path / "ours")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_mode_and_dtype(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    written(path, tokenizer)
    model, _ = scrimp.load(path, torch.bfloat16, mode="int8")
    assert {layer.mode for _, layer in int4_layers(model)} == {"int8"}
    assert model(TOKENS).logits.dtype == torch.bfloat16
    written(path, tokenizer, kind=lambda name: "F32")
    model, _ = scrimp.load(path)
    assert not any(isinstance(module, Int4Linear) for module in model.modules())
    with pytest.raises(ValueError, match=r"mode='int8' is for models of 4-bit weights, and .*gguf has none that stay"):
        scrimp.load(path, mode="int8")


def test_what_does_not_fit_is_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    written(path, tokenizer)
    whole = path.read_bytes()

    def words(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            scrimp.load(path)
        return str(caught.value)

    assert f"{path}: tensor " in words(whole[:-64])
    assert "would end at" in words(whole[:-64])
    assert f"{path}: tensor 'blk.1.attn_x.weight': a llama model has no place for it" == words(
        whole.replace(b"blk.1.attn_q", b"blk.1.attn_x")
    )
    moved = whole.replace(b"blk.1.ffn_norm", b"blk.7.ffn_norm")
    assert words(moved) == f"{path}: there is no tensor 'model.layers.1.post_attention_layernorm.weight'"

    def number(name: str, value: int) -> bytes:
        at = whole.index(name.encode()) + len(name) + 4
        return whole[:at] + value.to_bytes(4, "little") + whole[at + 4 :]

    name = "model.layers.0.mlp.gate_proj.qweight"
    said = words(number("llama.feed_forward_length", 128))
    assert said == f"{path}: tensor '{name}': shape [96, 32], but its model needs [128, 32]"
    said = words(number("llama.block_count", 2**31))
    assert said == f"{path}: num_hidden_layers={2**31}, but there are 51 tensors"
    path.write_bytes(whole)
    begin = scrimp.int4_weight.GgufFile(path).entries["blk.1.ffn_down.weight"].begin
    said = words(whole[:begin] + b"\x00\x7c" + whole[begin + 2 :])
    assert said.startswith(f"{path}: tensor 'blk.1.ffn_down.weight': scales")
    assert "is inf" in said


def test_any_damage_is_a_clean_error(tokenizer: Any, tmp_path: Path) -> None:
    """Header bytes of a whole model: it loads, or says in a ValueError or OSError that it does not."""
    path = tmp_path / "model.gguf"
    written(path, tokenizer, num_hidden_layers=1)
    whole = path.read_bytes()
    begin = min(entry.begin for entry in scrimp.int4_weight.GgufFile(path).entries.values())

    @settings(max_examples=25)
    @given(st.lists(st.tuples(st.integers(0, begin - 1), st.integers(0, 255)), min_size=1, max_size=3))
    def check(flips: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for at, value in flips:
            data[at] = value
        path.write_bytes(bytes(data))
        try:
            scrimp.load(path)
            said = str(path)
        except (ValueError, OSError) as error:
            said = str(error)
        assert str(path) in said

    check()
