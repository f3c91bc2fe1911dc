"""4-bit models through Hugging Face files: our own, and those of other makers, bit for bit; and the command line."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import scrimp
from scrimp import Int4Weight, cli
from scrimp.int4_weight import save_gptq
from scrimp.integrations.quantizer import load
from scrimp.methods.int4 import Int4Linear, int4_layers
from scrimp.methods.int4.blocks import linears_of, replace_module

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "int4"


def tiny(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | {"attention_bias": True} | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_round_trip(method: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=tied)
    order = "activations" if tied else "groups"
    scrimp.quantize(model, method, 32, TOKENS, order=order, kl_tokens=0, progress=False)  # type: ignore[arg-type]
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    for again in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)):
        assert torch.equal(again(TOKENS).logits, expected)
        assert repr(dict(int4_layers(again))) == repr(dict(int4_layers(model)))
        again.save_pretrained(tmp_path / "twice")
        assert torch.equal(load(tmp_path / "twice")(TOKENS).logits, expected)


def test_dtype_and_mode(tmp_path: Path) -> None:
    model = tiny()
    scrimp.quantize(model, "rtn", 32, progress=False, mode="int8")
    model.save_pretrained(tmp_path)
    same = load(tmp_path)
    assert {layer.mode for _, layer in int4_layers(same)} == {"int8"}
    assert torch.equal(same(TOKENS).logits, model(TOKENS).logits)
    other = load(tmp_path, dtype=torch.bfloat16, mode="exact")
    assert {layer.mode for _, layer in int4_layers(other)} == {"exact"}
    assert other(TOKENS).logits.dtype == torch.bfloat16
    for (_, layer), (_, mine) in zip(int4_layers(other), int4_layers(model), strict=True):
        assert torch.equal(layer.weight.dequantize(), mine.weight.dequantize())
    with pytest.raises(ValueError, match="load: mode='fast' must be one of exact, int8"):
        load(tmp_path, mode="fast")


def foreign(folder: Path, model: LlamaForCausalLM, config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Writes a model of another maker's tensors and returns the logits it must give."""
    plain = {n: t for n, t in model.state_dict().items() if not any(n.startswith(f"{m}.") for m in _quantized(model))}
    plain |= {f"{n}.bias": m.bias for n, m in _quantized(model).items() if m.bias is not None}
    save_file({name: t.contiguous().clone() for name, t in (plain | tensors).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": config}))
    return model(TOKENS).logits.detach()


def _quantized(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: linear for name, linear in linears_of(model).items() if name != "lm_head"}


def random_parts(linear: nn.Linear, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zeros [N, G] and fp16 scales [N, G]; the linear layer's weight becomes what they stand for."""
    N, K = linear.weight.shape
    codes, zeros = torch.randint(0, 16, (N, K)), torch.randint(1, 16, (N, K // group_size))
    scales = (0.02 * torch.rand(N, K // group_size) + 0.002).half()
    linear.weight.data = (codes - zeros.repeat_interleave(group_size, 1)) * scales.float().repeat_interleave(
        group_size, 1
    )
    return codes, zeros, scales


@pytest.mark.parametrize("maker", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_other_makers(maker: str, tmp_path: Path) -> None:
    model, tensors, size = tiny(), {}, 32
    gptq, awq = (runpy.run_path(str(GOLDEN / f"make_{name}.py")) for name in ("gptq", "awq"))
    ct = runpy.run_path(str(GOLDEN / "make_compressed_tensors.py"))

    def words(pack: Any, values: Tensor) -> Tensor:
        return torch.from_numpy(pack(values.numpy())).contiguous()

    for name, linear in _quantized(model).items():
        codes, zeros, scales = random_parts(linear, size)
        if maker == "compressed-tensors":
            tensors[f"{name}.weight_packed"] = words(ct["pack"], codes - 8)
            tensors[f"{name}.weight_scale"], tensors[f"{name}.weight_shape"] = scales, torch.tensor(codes.shape)
            tensors[f"{name}.weight_zero_point"] = words(ct["pack"], zeros.T.contiguous() - 8).T
            continue
        tensors[f"{name}.scales"] = scales.T
        if maker == "awq":
            tensors[f"{name}.qweight"] = words(awq["pack_columns"], codes.T)
            tensors[f"{name}.qzeros"] = words(awq["pack_columns"], zeros.T)
        else:
            tensors[f"{name}.qweight"] = words(gptq["pack_rows"], codes.T)
            tensors[f"{name}.qzeros"] = words(gptq["pack_rows"], zeros - int(maker == "gptq")).T
            tensors[f"{name}.g_idx"] = (torch.arange(codes.shape[1]) // size).int()
    config: dict[str, Any] = {"quant_method": maker.removesuffix("_v2"), "bits": 4, "group_size": size}
    config |= {"checkpoint_format": maker} if maker.startswith("gptq") else {}
    if maker == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": size, "strategy": "group"}
        config |= {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    expected = foreign(tmp_path, model, config, tensors)
    loaded = load(tmp_path, dtype=torch.float32)
    layers = dict(int4_layers(loaded))
    assert list(layers) == list(_quantized(model))
    for name, linear in _quantized(model).items():
        assert torch.equal(layers[name].weight.dequantize(), linear.weight)
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours")(TOKENS).logits, loaded(TOKENS).logits)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    model = tiny()
    scrimp.quantize(model, "rtn", 32, progress=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    name = "model.layers.1.mlp.up_proj"
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a safetensors file, or damaged"):
        load(tmp_path)
    scales = tensors[f"{name}.scales"].clone()
    scales[4, 1] = torch.nan
    save_file(tensors | {f"{name}.scales": scales}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: scales\[4, 1\] is nan; it must be finite"):
        load(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != f"{name}.zeros"}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"there is no tensor '{name}.zeros'"):
        load(tmp_path)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"version": 9}, "version 9; this scrimp reads 1"),
        ({"mode": "fast"}, "mode='fast' must be one of exact, int8"),
        ({"layouts": [{"layers": ["model.norm"]}]}, "model.norm is a LlamaRMSNorm"),
        ({"layouts": [{"layers": ["model.nothing"]}]}, "does not fit LlamaForCausalLM: .*nothing"),
        ({"layouts": [{"layers": [name]}]}, "does not fit LlamaForCausalLM: 'columns_per_input'"),
        ({"layouts": [config["quantization_config"]["layouts"][0] | {"group_size": 24}]}, "group_size=24 must be"),
    ):
        broken = config | {"quantization_config": config["quantization_config"] | change}
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"there is no config\.json; a model folder is needed"):
        load(tmp_path / "nowhere")


def test_eight_bits_travel_too(tmp_path: Path) -> None:
    """A layer of Q8_0 blocks, two columns an input."""
    model = tiny()
    q = torch.randint(-128, 128, (96, 64))
    halves = torch.stack((q.view(96, 2, 32) // 16 + 8, q.view(96, 2, 32) % 16), 2).view(96, 128)
    scales, zeros = torch.tensor([0.016, 0.001, 0.016, 0.001]).half(), torch.tensor([8, 0, 8, 0], dtype=torch.uint8)
    order = torch.arange(64, dtype=torch.int32).view(2, 1, 32).expand(2, 2, 32).reshape(-1)
    weight = Int4Weight.from_codes(halves, scales.repeat(96, 1), zeros.repeat(96, 1), permutation=order, in_features=64)
    replace_module(model, "lm_head", Int4Linear(weight))
    scrimp.quantize(model, "rtn", 32, progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    tiny().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    return folder


@pytest.mark.parametrize("layout", ["scrimp", "gptq"])
def test_command_line(layout: str, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = model_folder.parent / "out", model_folder.parent / "report.json"
    options = ["--method", "gptq", "--group-size", "32", "--length", "40", "--texts", "4", "--format", layout]
    command = ["quantize", str(model_folder), "--out", str(out), "--report", str(report), *options]
    assert cli.main([*command, "--text", str(model_folder.parent / "text.txt")]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["layers"]) == 14
    model = load(out)
    assert len(dict(int4_layers(model))) == 14
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids == [1, 2, 3]
    assert cli.main(command) == 2
    assert "is there and not an empty folder" in capsys.readouterr().err


def test_command_line_mistakes(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(*options: str) -> str:
        out = str(model_folder.parent / "out")
        assert cli.main(["quantize", str(model_folder), "--out", out, *options]) == 2
        assert not Path(out).exists()
        return capsys.readouterr().err

    text = str(model_folder.parent / "text.txt")
    assert "integer zeros; --method hqq makes floating ones" in words("--method", "hqq", "--format", "gptq")
    assert "gptq needs calibration tokens" in words("--texts", "0")
    assert "fewer than --length 100000" in words("--length", "100000", "--text", text)
    assert "--length 0 and --texts 32 must be at least 1 and 0" in words("--length", "0")
    assert "group_size=48 must be" in words("--group-size", "48", "--text", text)


def test_gptq_files_of_a_model_come_back(tmp_path: Path) -> None:
    model = tiny()
    scrimp.quantize(model, "rtn", 32, progress=False)
    weights = {name: layer.weight for name, layer in int4_layers(model)}
    plain = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(f"{m}." for m in weights))}
    plain |= {f"{n}.bias": layer.bias for n, layer in int4_layers(model) if layer.bias is not None}
    config = model.config.to_dict() | {"quantization_config": save_gptq(tmp_path, weights, plain)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_load_gives_the_tokenizer_too(tmp_path: Path) -> None:
    model = tiny()
    scrimp.quantize(model, "rtn", 32, progress=False)
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    loaded, tokenizer = scrimp.load(tmp_path, mode="int8")
    assert {layer.mode for _, layer in int4_layers(loaded)} == {"int8"}
    assert tokenizer("hello")["input_ids"] == [1]
    plain = tmp_path / "plain"
    tiny().save_pretrained(plain)
    with pytest.raises(ValueError, match="mode='int8' is for models of 4-bit weights"):
        scrimp.load(plain, mode="int8")
