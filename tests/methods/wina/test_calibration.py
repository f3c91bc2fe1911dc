"""Calibration against its definition, its files and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import scrimp
from scrimp import Calibration
from scrimp.methods.wina import METHODS, SPARSITIES
from scrimp.methods.wina.calibration import FORMAT, TENSORS, between

Calibrated = Callable[[str], tuple[Any, Calibration]]
NAMES = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


def inputs_of(model: Any, name: str, text: Tensor) -> Tensor:
    """What a layer gets, without each text's first token."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:]))
    with torch.no_grad():
        model(text)
    hook.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_curves_are_those_of_the_definition(family: str, calibrated: Calibrated, text: Tensor) -> None:
    model, calibration = calibrated(family)
    assert [[group.names for group in layer] for layer in calibration.layers] == [
        [tuple(f"model.layers.{i}.{name}" for name in names) for names in NAMES] for i in range(2)
    ]
    assert calibration.tokens == text.numel()
    for group in calibration.layers[1]:
        x = inputs_of(model, group.names[0], text)
        weight = torch.cat([model.get_submodule(name).weight.detach() for name in group.names])
        assert group.outputs == len(weight)
        torch.testing.assert_close(group.norms, weight.square().sum(0).sqrt())
        assert torch.equal(group.centers, x.sort(0).values[(len(x) - 1) // 2])
        for method, moved, scale in (
            ("teal", x, torch.ones(x.shape[1])),
            ("wina", x, group.norms),
            ("wina-centred", x - group.centers, group.norms),
        ):
            score = (moved * scale).abs()
            score = score / score.mean(-1, keepdim=True)
            for sparsity in (0.25, 0.5, 0.95):
                dropped = score <= group.level(method, sparsity)
                assert float(dropped.double().mean()) == pytest.approx(sparsity, abs=2e-3)
            some = slice(None, None, -(-len(x) // 128))
            error = (moved.where(dropped, 0)[some] @ weight.T).norm() / (x[some] @ weight.T).norm()
            assert group.error(method, 0.95) == pytest.approx(float(error), rel=0.02)


def test_errors_grow_with_the_sparsity(calibrated: Calibrated) -> None:
    _, calibration = calibrated("llama")
    for group in (group for layer in calibration.layers for group in layer):
        assert (group.levels[:, 0] == 0).all()
        assert (group.levels.diff() >= 0).all()
        assert (group.errors[:, 0] == 0).all()
        known = slice(None) if group.names[0].endswith("down_proj") else slice(METHODS.index("cats"))
        assert (group.errors[known, -1] > group.errors[known, 10]).all()
        assert METHODS[-1] == "cats"


def test_curves_are_linear_between_their_points() -> None:
    curve = torch.arange(21.0)
    assert between(curve, 0.0) == 0
    assert between(curve, 0.125) == pytest.approx(2.5)
    assert between(curve, 0.95) == pytest.approx(19)
    assert between(curve, 0.97) == pytest.approx(19.5)
    assert between(curve, 0.99) == 20


def test_sensitivities_predict_divergence(calibrated: Calibrated, text: Tensor) -> None:
    """Noise of a known size at the outputs of a group: half its square times the sensitivity, on the whole."""
    model, calibration = calibrated("qwen2")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    random, size, predicted, measured = torch.Generator().manual_seed(1), 0.02, [], []
    with torch.no_grad():
        dense = model(text).logits[:, 1:].log_softmax(-1)
        for group in (group for layer in calibration.layers for group in layer):

            def disturb(module: Any, _: Any, output: Tensor) -> Tensor:
                y = output if module.bias is None else output - module.bias
                noise = torch.randn(output.shape, generator=random)
                return output + noise * size * y.norm(dim=-1, keepdim=True) / output.shape[-1] ** 0.5

            hooks = [model.get_submodule(name).register_forward_hook(disturb) for name in group.names]
            noisy = model(text).logits[:, 1:].log_softmax(-1)
            for hook in hooks:
                hook.remove()
            measured.append(float((dense.exp() * (dense - noisy)).sum(-1).mean()))
            predicted.append(group.sensitivity * size**2 / 2)
    ratios = torch.tensor(predicted) / torch.tensor(measured)
    assert ((ratios > 1 / 3) & (ratios < 3)).all(), ratios
    assert max(measured) > 5 * min(measured)


def test_files(calibrated: Calibrated, tmp_path: Path) -> None:
    model, calibration = calibrated("llama")
    calibration.save(tmp_path / "file.safetensors")
    found = Calibration.load(tmp_path / "file.safetensors", model)
    assert (found.weight_hash, found.model, found.tokens) == (calibration.weight_hash, "LlamaForCausalLM", 180)
    for mine, theirs in zip(calibration.layers, found.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.names, a.outputs, a.sensitivity) == (b.names, b.outputs, b.sensitivity)
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def test_another_model_is_refused_with_both_hashes(calibrated: Calibrated, tmp_path: Path) -> None:
    model, calibration = calibrated("llama")
    model.lm_head.weight.data.mul_(2)
    path = tmp_path / "file.safetensors"
    calibration.save(path)
    for use in (lambda: Calibration.load(path, model), lambda: scrimp.sparsify(model, calibration)):
        with pytest.raises(ValueError, match=f"weights {calibration.weight_hash} .* this model's are [0-9a-f]{{32}}"):
            use()


def damaged(header: dict[str, Any], tensors: dict[str, Tensor], how: str) -> str:
    """Changes what a file holds; the words of the error."""
    first = "model.layers.0.self_attn.q_proj"
    if how == "format":
        header["format"] = "something"
        return "not a calibration"
    if how == "version":
        header["version"] = 7
        return "version 7 of calibrations; this reads 2"
    if how == "grid":
        header["sparsities"] = [0.5]
        return "of other methods or sparsities"
    if how == "header":
        del header["layers"]
        return "the header of the calibration is damaged: KeyError"
    if how == "sensitivity":
        header["layers"][1][2]["sensitivity"] = -1.0
        return r"gate_proj has sensitivity -1.0; it must be finite and not negative"
    if how == "missing":
        del tensors[f"{first}.levels"]
        return "q_proj.levels': missing"
    if how == "shape":
        tensors[f"{first}.centers"] = torch.zeros(3)
        return r"q_proj.centers': shape \[3\], expected \[48\]"
    tensors[f"{first}.norms"][5] = torch.nan
    return r"element \[5\] is nan; it must be finite"


@pytest.mark.parametrize("how", ["format", "version", "grid", "header", "sensitivity", "missing", "shape", "nan"])
def test_damaged_files_are_refused(how: str, calibrated: Calibrated, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    calibrated("llama")[1].save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    words = damaged(header, tensors, how)
    save_file(tensors, path, metadata={FORMAT: json.dumps(header)})
    with pytest.raises(ValueError, match=words):
        Calibration.load(path)


def test_layers_of_a_file_must_be_the_models(calibrated: Calibrated, tmp_path: Path) -> None:
    model, calibration = calibrated("llama")
    (first, *rest), second = calibration.layers
    renamed = replace(first, names=("model.layers.0.self_attn.x_proj", *first.names[1:]))
    for layers in (((renamed, *rest), second), (calibration.layers[0],)):
        replace(calibration, layers=layers).save(tmp_path / "file.safetensors")
        found = Calibration.load(tmp_path / "file.safetensors", model)
        with pytest.raises(ValueError, match=f"sparsify: the calibration's {len(layers)} layers are not the model's"):
            scrimp.sparsify(model, found)


def test_files_of_another_kind_are_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    calibrated("llama")[1].save(path)
    whole = path.read_bytes()
    for content, words in ((whole[:-9], "damaged"), (b"x" * 100, "damaged"), (b"", "damaged")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            Calibration.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.load(path)
    with pytest.raises(ValueError, match="there is no such file"):
        Calibration.load(tmp_path / "nothing")


def test_bad_texts_and_models(calibrated: Calibrated, text: Tensor) -> None:
    model, _ = calibrated("llama")
    for bad, words in (
        ([], "there is no text"),
        (text.float(), r"text\[0\] is torch.float32 \[1, 60\], not int64"),
        (text[:, :1], r"text\[0\] is torch.int64 \[1, 1\], not int64 \[1, n > 1\]"),
        ([text[:1], text[0]], r"text\[1\] is torch.int64 \[60\]"),
    ):
        with pytest.raises(ValueError, match=f"calibrate: {words}"):
            scrimp.calibrate(model, bad, progress=False)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"calibrate: the inputs of model.layers.1.mlp.down_proj are not finite"):
        scrimp.calibrate(model, text, progress=False)
    sparse, calibration = calibrated("llama")
    scrimp.sparsify(sparse, calibration)
    with pytest.raises(ValueError, match=r"calibrate: model.layers.0.self_attn.q_proj is a SparseLinear, not a dense"):
        scrimp.calibrate(sparse, text, progress=False)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="calibrate: a GPT2LMHeadModel is none of LlamaForCausalLM, Mistral"):
        scrimp.calibrate(other, text, progress=False)


def test_text_as_a_list(calibrated: Calibrated, text: Tensor) -> None:
    model, calibration = calibrated("llama")
    again = scrimp.calibrate(model, list(text.split(1)), progress=False)
    assert torch.equal(again.layers[1][3].errors, calibration.layers[1][3].errors)
    assert again.weight_hash == replace(calibration).weight_hash
    assert again.layers[0][0].levels.shape == (len(METHODS), len(SPARSITIES))
