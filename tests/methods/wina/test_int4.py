"""Activation sparsity of 4-bit layers: Int4SparseLinear alone, in stock generate and in the decoding loop."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import scrimp
from scrimp import Calibration
from scrimp.int4_weight import Int4Channels
from scrimp.methods.generation import DecoderModel, decoder_model
from scrimp.methods.generation.linear import SideBySide
from scrimp.methods.int4 import Int4Linear
from scrimp.methods.tree_decoding import SelfDraft
from scrimp.methods.wina import Int4SparseLinear, Selection, metered
from scrimp.methods.wina.int4_linear import EngineInt4Sparse, dequantized
from scrimp.ops.int4_linear import MODES
from scrimp.testing import random_int4_weight, same_bits

K, SIZES = 64, (24, 8, 130)
PROMPTS = torch.randint(1, 256, (2, 11), generator=torch.Generator().manual_seed(3))


def selection(level: float = 0.7, centred: bool = False) -> Selection:
    scale, center = 0.5 + torch.rand(K), torch.randn(K)
    return Selection(torch.tensor([level]), scale, center if centred else None)


def layers(chosen: Selection, mode: str = "exact") -> list[Int4SparseLinear]:
    """With and without a bias, one with permuted inputs."""
    weights = [random_int4_weight(n, K, 16, "uint8", permuted=n == 8) for n in SIZES]
    biases = [torch.randn(24), None, torch.randn(130)]
    return [Int4SparseLinear(w, b, chosen, mode) for w, b in zip(weights, biases, strict=True)]


@pytest.mark.parametrize("centred", [False, True])
def test_a_token_skips_channels_and_a_prompt_none(centred: bool) -> None:
    chosen, x = selection(centred=centred), torch.randn(2, 5, K)
    for layer in layers(chosen):
        weight, bias = layer.channels.weight().dequantize(), 0 if layer.bias is None else layer.bias
        dense = x @ weight.T + bias
        torch.testing.assert_close(layer(x), dense)
        center = 0 if chosen.center is None else chosen.center
        score = ((x - center) * chosen.scale).abs()
        kept = score > chosen.level * score.mean(-1, keepdim=True)
        expected = x.where(kept, center + torch.zeros(K)) @ weight.T + bias
        for t in range(5):
            torch.testing.assert_close(layer(x[:, t : t + 1]), expected[:, t : t + 1])
        torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])
        assert not torch.allclose(expected, dense)


def test_not_a_number_comes_out() -> None:
    x = torch.zeros(1, 1, K)
    x[0, 0, 3] = torch.nan
    for mode in MODES:
        assert all(layer(x).isnan().all() for layer in layers(selection(level=float(K)), mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("centred", [False, True])
def test_the_loop_gets_the_same_bits(mode: str, centred: bool) -> None:
    parts = layers(selection(centred=centred), mode)
    engine = Int4SparseLinear.engine_linear(parts)
    assert isinstance(engine, EngineInt4Sparse)
    assert engine.sizes == SIZES
    x, residual = torch.randn(3, 1, K), torch.randn(3, 1, sum(SIZES))
    expected = torch.cat([part(x) for part in parts], -1)
    assert same_bits(engine(x), expected)
    assert same_bits(engine(x, residual), expected + residual)
    prompt = torch.randn(1, 70, K)
    whole = torch.cat([part(prompt) for part in parts], -1)
    assert same_bits(engine.dense(prompt), whole)
    for linear in (engine, engine.dense):
        together = linear(prompt[:, :64])
        assert all(same_bits(linear(prompt[:, t : t + 1]), together[:, t : t + 1]) for t in range(64))
    apart = Int4SparseLinear.engine_linear([parts[0], *layers(selection(level=2.0))[1:]])
    assert isinstance(apart, SideBySide)
    assert same_bits(apart(x)[..., :24], parts[0](x))


def test_casts_and_copies_keep_the_weight() -> None:
    for layer in layers(selection(centred=True)):
        made = copy.deepcopy(layer).to(torch.bfloat16)
        assert made.scales.dtype == torch.float16
        assert made.selection.level.dtype == torch.float32
        assert torch.equal(made.channels.weight().dequantize(), layer.channels.weight().dequantize())
        assert made(torch.randn(2, 1, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert made.channels.codes.data_ptr() == made.codes.data_ptr()
        assert made.to("meta").channels.scales.device.type == "meta"


def test_the_state_dict_is_that_of_the_layer_it_replaces() -> None:
    weight, bias = random_int4_weight(5, K, 32, "offset", permuted=True), torch.randn(5)
    plain, sparse = Int4Linear(weight, bias), Int4SparseLinear(weight, bias, selection(centred=True))
    assert sorted(sparse.state_dict()) == sorted(plain.state_dict())
    fresh = Int4Linear(random_int4_weight(5, K), torch.zeros(5))
    fresh.load_state_dict(sparse.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(fresh(x), plain(x))


# ---- whole models ----


Calibrated = tuple[Any, Calibration]


@pytest.fixture(scope="module")
def quantized() -> Callable[..., Calibrated]:
    """A fresh copy of a tiny 4-bit model, and its calibration."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(1)
    dense = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, initializer_range=0.3)).eval()
    text = torch.randint(1, 256, (3, 60), generator=torch.Generator().manual_seed(5))
    made: dict[str, Calibrated] = {}

    def find(mode: str = "int8") -> Calibrated:
        if mode not in made:
            model = copy.deepcopy(dense)
            scrimp.quantize(model, "rtn", 32, mode=mode, progress=False)
            made[mode] = model, scrimp.calibrate(model, text, progress=False)
        return copy.deepcopy(made[mode][0]), made[mode][1]

    return find


def tokens(model: Any, new: int = 12, **options: Any) -> list[list[int]]:
    found: Any = scrimp.generate(model, PROMPTS, max_new_tokens=new, **options)
    return [each.tokens for each in found]


@pytest.mark.parametrize("method", ["teal", "wina", "wina-centred"])
@pytest.mark.parametrize("mode", MODES)
def test_the_loop_and_stock_generate_agree(mode: str, method: str, quantized: Callable[..., Calibrated]) -> None:
    model, calibration = quantized(mode)
    report = scrimp.sparsify(model, calibration, 0.5, method)
    assert len(report.layers) == 8
    assert sum(isinstance(module, Int4SparseLinear) for module in model.modules()) == 14
    with metered(model, certified=method == "wina") as usage:
        found = tokens(model)
    whole = torch.ones_like(PROMPTS)
    stock = model.generate(PROMPTS, attention_mask=whole, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found == stock[:, PROMPTS.shape[1] :].tolist()
    assert 0.3 < usage.dropped < 0.7
    assert all(layer.bytes_saved > 0 for layer in usage.layers())
    assert found != tokens(quantized(mode)[0])


@pytest.mark.parametrize("mode", MODES)
def test_layers_in_one_call_have_the_bits_of_their_ops(
    mode: str, quantized: Callable[..., Calibrated], same_in_one_call: Callable[[DecoderModel], None]
) -> None:
    model, calibration = quantized(mode)
    scrimp.sparsify(model, calibration, 0.5)
    for view in (decoder_model(model), decoder_model(model).for_prompts):
        same_in_one_call(view)
    with metered(model):
        assert view.packed(range(2)) is not None  # prompts skip nothing
        assert decoder_model(model).packed(range(2)) is None


def test_a_sparse_draft_loses_nothing(quantized: Callable[..., Calibrated]) -> None:
    """Guesses of the sparse model, judged by the dense one on the same codes: the 4-bit model's own tokens."""
    model, calibration = quantized()
    expected = tokens(model, 24)
    scrimp.sparsify(model, calibration, 0.3)
    view = decoder_model(model)
    assert tokens(view.for_prompts, 24) == expected
    assert tokens(view.for_prompts, 24, draft=scrimp.tree_decoding(SelfDraft(view))) == expected


def test_calibration_is_that_of_the_dequantized_model(quantized: Callable[..., Calibrated]) -> None:
    model, calibration = quantized()
    text = torch.randint(1, 256, (3, 60), generator=torch.Generator().manual_seed(5))
    with dequantized(model) as was_int4:
        assert was_int4
        dense = scrimp.calibrate(model, text, progress=False)
    assert isinstance(model.model.layers[1].mlp.up_proj, Int4Linear)
    calibration.check(model)
    assert dense.weight_hash != calibration.weight_hash
    for mine, theirs in zip(sum(calibration.layers, ()), sum(dense.layers, ()), strict=True):
        assert torch.equal(mine.norms, theirs.norms)
        assert torch.equal(mine.levels, theirs.levels)


def test_what_does_not_fit_is_refused(quantized: Callable[..., Calibrated]) -> None:
    model, calibration = quantized()
    for method in ("cats", "wina-rotated"):
        with pytest.raises(ValueError, match=f"method='{method}' needs dense layers; model.layers.0.self_attn.q"):
            scrimp.sparsify(model, calibration, 0.1, method)
    with dequantized(model):
        k_proj = model.model.layers[0].self_attn.k_proj
    model.model.layers[0].self_attn.k_proj = k_proj
    mixed = scrimp.calibrate(model, torch.randint(1, 256, (1, 30)), progress=False)
    with pytest.raises(ValueError, match=r"q_proj, .*v_proj, which share an input, some are 4-bit and some dense"):
        scrimp.sparsify(model, mixed)
    assert not any(isinstance(module, Int4SparseLinear) for module in model.modules())


def test_a_saved_model_is_the_4_bit_one(quantized: Callable[..., Calibrated]) -> None:
    model, calibration = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scrimp.sparsify(model, calibration)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_channels_are_all_there_is(quantized: Callable[..., Calibrated]) -> None:
    """No second copy of the codes."""
    model, calibration = quantized()
    scrimp.sparsify(model, calibration)
    layer = model.model.layers[0].mlp.up_proj
    held = (*layer.parameters(), *layer.buffers())
    names = set(Int4Channels.of(layer.channels.weight()).tensors()) | {"offset"}
    assert {name for name, _ in layer.named_buffers()} <= names
    assert sum(tensor.nbytes for tensor in held if tensor.dtype == torch.uint8) == 64 * 64 + 2 * 96
