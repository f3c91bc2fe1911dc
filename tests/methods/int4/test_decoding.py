"""4-bit models in the decoding engine and in Hugging Face's own generate."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import scrimp
from scrimp.methods.generation import KVCache, decoder_model
from scrimp.methods.int4 import Int4Linear, quantize
from scrimp.methods.int4.blocks import replace_module
from scrimp.methods.int4.linear import EngineInt4
from scrimp.testing import random_int4_weight

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
PROMPTS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(3))


def model_of(family: str = "llama", method: str = "rtn", mode: str = "exact", **options: Any) -> Any:
    make_config, make_model = MODELS[family]
    model = make_model(make_config(**SIZES, eos_token_id=None)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    quantize(model, method, 32, PROMPTS, kl_tokens=0, progress=False, mode=mode, **options)
    return model


def stock(model: Any, new: int) -> list[list[int]]:
    whole = torch.ones_like(PROMPTS)
    found = model.generate(
        PROMPTS, attention_mask=whole, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=96
    )
    return found[:, PROMPTS.shape[1] :].tolist()


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "rtn", {"symmetric": True}),
        ("qwen2", "rtn", {}),
        ("llama", "hqq", {}),
        ("llama", "gptq", {"order": "activations"}),
        ("llama", "rtn", {"skip": ["lm_head", "k_proj", "down_proj"]}),
    ],
    ids=["none8", "bias", "float", "permuted", "mixed"],
)
def test_engine_and_stock_generate_agree(family: str, method: str, options: dict[str, Any], mode: str) -> None:
    model = model_of(family, method, mode, **options)
    found: Any = scrimp.generate(model, PROMPTS, max_new_tokens=12)
    assert [each.tokens for each in found] == stock(model, 12)


def test_a_packed_head() -> None:
    model = model_of(mode="int8")
    replace_module(model, "lm_head", Int4Linear(random_int4_weight(96, 64, 32, "uint8"), mode="int8"))
    found: Any = scrimp.generate(model, PROMPTS, max_new_tokens=8)
    assert [each.tokens for each in found] == stock(model, 8)


def test_layers_of_one_input_are_side_by_side() -> None:
    kinds = {"none8": 5, "offset": 3}
    layers = [Int4Linear(random_int4_weight(n, 64, 16, kind), torch.randn(n)) for kind, n in kinds.items()]
    fused, x, residual = Int4Linear.engine_linear(layers), torch.randn(2, 3, 64), torch.randn(2, 3, 8)
    assert isinstance(fused, EngineInt4)
    assert fused.sizes == (5, 3)
    expected = torch.cat([layer(x) for layer in layers], -1)
    assert torch.equal(fused(x), expected)
    assert torch.equal(fused(x, residual), expected + residual)


def test_bfloat16() -> None:
    model = model_of(mode="int8").bfloat16()
    found: Any = scrimp.generate(model, PROMPTS, max_new_tokens=4)
    assert [len(each.tokens) for each in found] == [4, 4]
    assert decoder_model(model).dtype == torch.bfloat16


def test_the_engine_sees_that_weights_changed() -> None:
    model = model_of()
    before = decoder_model(model)
    assert before.is_still(decoder_model(model))
    model.model.layers[0].mlp.up_proj.scales.mul_(2)
    assert not before.is_still(decoder_model(model))


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_logits_do_not_depend_on_company(mode: str) -> None:
    """One row and many give the same bits, so a prompt read alone or beside another gives the same keys."""
    model = model_of("qwen2", mode=mode)
    together, alone = KVCache(model, 2, 32), [KVCache(model, 1, 32) for _ in PROMPTS]
    scrimp.generate(model, PROMPTS, max_new_tokens=6, cache=together)
    for b, cache in enumerate(alone):
        scrimp.generate(model, PROMPTS[b : b + 1], max_new_tokens=6, cache=cache)
        held = len(cache.tokens[0])
        assert together.tokens[b] == cache.tokens[0]
        assert torch.equal(together.memory[:, :, b, :, :held], cache.memory[:, :, 0, :, :held])
