"""A whole model: statistics, folding, what each method replaces and reports, and words for what does not fit."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from scrimp.methods.int4 import Grid, Int4Linear, int4_layers, quantize
from scrimp.methods.int4 import blocks as parts
from scrimp.methods.int4.awq import find_input_scales, find_limits
from scrimp.methods.int4.grid import rounded
from scrimp.methods.int4.quantize import METHODS, _Job, _scale_inputs
from scrimp.methods.int4.statistics import InputStatistics

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def tiny(make: str = "llama", **changes: Any) -> Any:
    """A model with loud inputs here and there, so that the methods differ."""
    config = (LlamaConfig if make == "llama" else Gemma2Config)(**(SIZES | changes))
    model = (LlamaForCausalLM if make == "llama" else Gemma2ForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if make == "llama" else -0.5))
                parameter[::9] *= 6
            elif parameter.dim() == 2:
                parameter.mul_(4)
    return model


def text(samples: int = 3, length: int = 40) -> Tensor:
    return torch.randint(0, 80, (samples, length))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", ["llama", "gemma"])
def test_every_method_on_a_model(method: str, make: str) -> None:
    model, tokens = tiny(make), text()
    linears = [name for name in parts.linears_of(model) if name != "lm_head"]
    with torch.no_grad():
        before = model(tokens).logits
    report = quantize(model, method, 64, tokens, kl_tokens=30, progress=False)
    assert [layer.name for layer in report.layers] == linears
    assert [name for name, _ in int4_layers(model)] == linears
    assert isinstance(model.lm_head, nn.Linear)
    for layer in report.layers:
        assert layer.weighed
        assert layer.error < 0.2
        assert layer.group_size == (32 if "down_proj" in layer.name else 64)
    assert list(report.divergence) == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        after = model(tokens).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.5
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == linears[0]
    assert len(str(report).splitlines()) == 2 + len(linears)
    assert model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_methods_that_see_inputs_lose_less() -> None:
    tokens, losses = text(8), {}
    model = tiny()
    for method in METHODS:
        report = quantize(copy.deepcopy(model), method, 64, tokens, progress=False)
        losses[method] = sum(layer.error for layer in report.layers)
    assert losses["gptq"] < 0.8 * losses["rtn"]
    assert losses["awq"] < losses["rtn"]


def test_without_calibration_weights_are_compared() -> None:
    model = tiny()
    report = quantize(model, "rtn", 32, skip=["lm_head", "*.mlp.*", "q_proj"], progress=False)
    names = [layer.name.split(".")[-1] for layer in report.layers]
    assert names == ["k_proj", "v_proj", "o_proj"] * 2
    assert not any(layer.weighed for layer in report.layers)
    assert not report.divergence
    assert "error of the weights" in str(report)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_options_reach_the_weights() -> None:
    def first(**options: Any) -> Int4Linear:
        model = tiny()
        quantize(model, calibration=text(), kl_tokens=0, progress=False, **options)
        return next(int4_layers(model))[1]

    assert first(method="rtn", symmetric=True).weight.zero_kind == "none8"
    assert first(method="hqq").weight.zero_kind == "float"
    assert first(method="gptq", order="activations").weight.permutation is not None
    assert first(method="awq", scale_dtype=torch.bfloat16).weight.scales.dtype == torch.bfloat16
    assert first(method="rtn", group_size=-1).weight.group_size == 64
    assert first(method="rtn", mode="int8").mode == "int8"


def test_statistics_are_those_of_the_inputs() -> None:
    model, tokens = tiny(), text()
    blocks = list(parts.find_blocks(model).values())
    seen: list[Tensor] = []
    handle = blocks[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        samples = [parts.enter(model, blocks, row[None]) for row in tokens]
        seen.clear()
        found = parts.observe(blocks[0], 0, samples)
    handle.remove()
    rows = torch.cat(seen).flatten(0, 1)
    torch.testing.assert_close(found["self_attn.o_proj"].gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["self_attn.o_proj"].magnitude, rows.abs().sum(0), rtol=1e-4, atol=1e-4)
    assert found["self_attn.o_proj"].rows == 120
    assert found["self_attn.q_proj"] is found["self_attn.k_proj"] is found["self_attn.v_proj"]
    assert found["mlp.gate_proj"] is found["mlp.up_proj"]
    assert len({id(stats) for stats in found.values()}) == 4
    matrix, s = torch.randn(5, 64), torch.rand(64) + 0.5
    torch.testing.assert_close(found["self_attn.o_proj"].energy(matrix), (rows @ matrix.T).square().sum())
    divided = found["self_attn.o_proj"].divided(s)
    torch.testing.assert_close(divided.energy(matrix * s), found["self_attn.o_proj"].energy(matrix))
    torch.testing.assert_close(divided.magnitude, (rows / s).abs().sum(0), rtol=1e-4, atol=1e-4)


def test_blocks_follow_the_model() -> None:
    """Layer by layer the hidden states are the model's own, also where layers get different masks (Gemma 2)."""
    for make in ("llama", "gemma"):
        model, tokens = tiny(make, **({"sliding_window": 8} if make == "gemma" else {})), text(1)
        blocks = list(parts.find_blocks(model).values())
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states
            sample = parts.enter(model, blocks, tokens)
            torch.testing.assert_close(sample.hidden, states[0])
            for index, block in enumerate(blocks):
                sample.hidden = parts.step(block, index, sample)
            norm = model.model.norm(sample.hidden)
        torch.testing.assert_close(norm, states[-1])


@pytest.mark.parametrize("make", ["llama", "gemma"])
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "one each"])
def test_folding_changes_no_output(make: str, heads: int) -> None:
    model, tokens = tiny(make, num_key_value_heads=heads), text()
    before = copy.deepcopy(model)
    blocks = parts.find_blocks(model)
    job = _Job("awq", 64, Grid(steps=1), "groups", (), "exact")
    with torch.no_grad():
        samples = [parts.enter(model, list(blocks.values()), row[None]) for row in tokens]
        for index, (at, block) in enumerate(blocks.items()):
            inputs = parts.observe(block, index, samples)
            energy = inputs["mlp.down_proj"].energy(block.mlp.down_proj.weight)  # type: ignore[union-attr,operator]
            _scale_inputs(block, inputs, list(parts.linears_of(block)), job, at)
            again = inputs["mlp.down_proj"].energy(block.mlp.down_proj.weight)  # type: ignore[union-attr,operator]
            torch.testing.assert_close(energy, again, rtol=1e-3, atol=0)
            for sample in samples:
                sample.hidden = parts.step(block, index, sample)
        torch.testing.assert_close(model(tokens).logits, before(tokens).logits, rtol=1e-3, atol=1e-3)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    layer = {name.removeprefix("model.layers.0.") for name in moved if ".0." in name}
    expected = {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    expected |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    expected |= {"pre_feedforward_layernorm" if make == "gemma" else "post_attention_layernorm"}
    expected |= {"self_attn.o_proj"} if heads == 4 else set()
    assert layer == {f"{name}.weight" for name in expected}


def test_a_norm_without_gain_is_left_alone() -> None:
    assert not parts.divide_norm(nn.LayerNorm(8, elementwise_affine=False), torch.full((8,), 2.0))
    norm = nn.LayerNorm(8)
    assert not parts.divide_norm(norm, torch.full((8,), 2.0))  # its bias would have to be divided too
    assert torch.equal(norm.weight, torch.ones(8))


def statistics(rows: Tensor) -> InputStatistics:
    found = InputStatistics.empty(rows.shape[1])
    found.add(rows)
    return found


def test_input_scales_are_the_best_of_the_grid() -> None:
    x = torch.randn(200, 64) * torch.linspace(0.1, 6, 64).square()
    weights, inputs = [torch.randn(8, 64), torch.randn(16, 64)], statistics(x)
    grid = Grid(steps=1)

    def lost(s: Tensor) -> float:
        total = 0.0
        for weight in weights:
            groups = (weight * s).view(-1, 2, 32)
            rough = rounded(groups, *grid.fit(groups)).view(weight.shape) / s
            total += float((x @ (rough - weight).T).square().sum())
        return total

    s = find_input_scales(weights, inputs, 32, grid)
    a, b = x.abs().mean(0), torch.cat(weights).abs().view(24, 2, 32)
    b = (b / (b.amax(-1, keepdim=True) + 1e-6)).view(24, 64).mean(0)
    tried = [torch.ones(64)]
    for point in range(20):
        t = a.pow(point / 20) / (b.pow(1 - point / 20) + 1e-4)
        tried.append(t / (t.max() * t.min()).sqrt())
    losses = [lost(t) for t in tried]
    assert lost(s) == pytest.approx(min(losses), rel=1e-4)
    assert lost(s) < 0.9 * losses[0]


def test_limits_are_the_best_of_the_grid() -> None:
    x, weight = torch.randn(150, 64), torch.randn(6, 64) ** 3
    limits, grid = find_limits(weight, statistics(x), 32, Grid(steps=1)), Grid(steps=1)
    assert limits.shape == (6, 2)
    for n, g in ((0, 0), (5, 1)):
        part, rows = weight[n, 32 * g : 32 * g + 32], x[:, 32 * g : 32 * g + 32]
        found = []
        for step in range(10):
            limit = part.abs().max() * (1 - step / 20)
            change = rounded(part, *grid.fit(part, limit)) - part
            found.append((float((rows @ change).square().sum()), float(limit)))
        assert float(limits[n, g]) == pytest.approx(min(found)[1])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "int3"}, "method='int3' must be one of rtn, hqq, gptq, awq"),
    "no text": ({"method": "gptq"}, "gptq needs calibration tokens"),
    "empty text": ({"method": "awq", "calibration": text()[:0]}, "awq needs calibration tokens"),
    "floats": ({"calibration": text().float()}, r"calibration\[0\] is torch.float32 \[1, 40\], not int64 \[1, n\]"),
    "rank": ({"calibration": [text()[0]]}, r"calibration\[0\] is torch.int64 \[40\]"),
    "symmetric": ({"method": "hqq", "symmetric": True}, "hqq has floating zeros"),
    "group size": ({"method": "rtn", "group_size": 8}, "group_size=8 must be 16, 32, 64, 128 or -1"),
    "mode": ({"mode": "int4"}, "mode='int4' must be one of exact, int8"),
    "head": ({"calibration": text(), "skip": ()}, "lm_head lies outside the decoder layers; name it in skip"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_call(case: str) -> None:
    options, words = BAD[case]
    with pytest.raises(ValueError, match=f"quantize: {words}"):
        quantize(tiny(), progress=False, **options)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"):
        quantize(nn.Linear(4, 4), "gptq", calibration=text(), progress=False)
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"quantize: model.layers.1.mlp.up_proj: .*weight\[3, 5\] is nan"):
        quantize(model, "rtn", progress=False)
