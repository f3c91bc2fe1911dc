"""Draft maps: their file and its faults, what they compute, and the drafts that come of them."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scrimp.benchmarks.tree_exact import Free
from transformers import PreTrainedModel

import scrimp
from scrimp.integrations.transformers import custom_generate
from scrimp.methods.generation import KVCache, decoder_model, forward
from scrimp.methods.tree_decoding import DraftMaps, HiddenTransfer, MedusaHeads, ahead, trained
from scrimp.methods.tree_decoding.maps import FORMAT, model_hash
from scrimp.methods.tree_decoding.sources.heads import _product
from scrimp.methods.tree_decoding.tree import Tree, together

Tiny = Callable[[str], PreTrainedModel]
D = 48


def maps(
    model: PreTrainedModel, kind: Any = "hidden", layer: int = 1, k: int = 3, tokens: list[int] | None = None
) -> DraftMaps:
    weight, bias = torch.randn(k, D, D) / D**0.5, torch.randn(k, D)
    some = None if tokens is None else torch.tensor(tokens, dtype=torch.int32)
    return DraftMaps(kind, layer, weight, bias, model_hash(decoder_model(model)), "tiny", some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_maps_compute(dtype: torch.dtype, tiny: Tiny) -> None:
    own, states = maps(tiny("llama")), torch.randn(2, 5, D).to(dtype)
    size = states.double().square().mean(-1, keepdim=True).sqrt()
    wanted = torch.stack(
        [states.double() @ w.double().T + size * b for w, b in zip(own.weight, own.bias, strict=True)], 2
    )
    got = own(states)
    assert got.dtype == dtype
    assert got.shape == (2, 5, 3, D)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert own(torch.zeros(1, D)).isfinite().all()


@pytest.mark.parametrize("tokens", [None, [0, 7, 255]])
def test_a_file_and_back(tokens: list[int] | None, tiny: Tiny, tmp_path: Path) -> None:
    own = maps(tiny("llama"), tokens=tokens)
    own.save(tmp_path / "maps.safetensors")
    read = DraftMaps.load(tmp_path / "maps.safetensors")
    assert (read.kind, read.layer, read.offsets, read.weight_hash, read.model) == (
        ("hidden", 1, [2, 3, 4], own.weight_hash, "tiny")
    )
    assert torch.equal(read.weight, own.weight)
    assert torch.equal(read.bias, own.bias)
    assert (None if read.tokens is None else read.tokens.tolist()) == tokens
    trees = scrimp.tree_decoding(HiddenTransfer(tmp_path / "maps.safetensors"))
    plain = scrimp.generate(tiny("llama"), [1, 2], max_new_tokens=8)
    assert scrimp.generate(tiny("llama"), [1, 2], max_new_tokens=8, draft=trees) == plain


def test_the_hash_is_of_the_weights(tiny: Tiny) -> None:
    """It is the same in bf16, and another one as soon as a weight changes."""
    model = tiny("llama")
    before = model_hash(decoder_model(model))
    assert model_hash(decoder_model(model)) == before
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    assert model_hash(decoder_model(other)) == before
    assert model_hash(decoder_model(other.bfloat16())) == before
    with torch.no_grad():
        other.model.norm.weight[3] += 1
    assert model_hash(decoder_model(other)) != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            lambda model: HiddenTransfer(maps(model("qwen3"))),
            "these are for weights {qwen3} .tiny., .* are {llama}; tr",
        ),
        (lambda model: MedusaHeads(maps(model("qwen3"), "medusa", 2)), "these are for weights {qwen3} .* are {llama}"),
        (lambda model: MedusaHeads(maps(model("llama"))), "these are of kind 'hidden', not 'medusa'"),
        (
            lambda model: HiddenTransfer(maps(model("llama"), layer=2)),
            "after layer 2, but the model has 2 layers of 48",
        ),
        (lambda model: MedusaHeads(maps(model("llama"), "medusa", 1)), "medusa maps of 48 numbers after layer 1"),
        (lambda model: HiddenTransfer(maps(model("llama"), tokens=[9, 256])), "token 256 of a model with 256"),
    ],
)
def test_maps_that_do_not_fit_the_model(source: Any, message: str, tiny: Tiny) -> None:
    hashes = {name: model_hash(decoder_model(tiny(name))) for name in ("llama", "qwen3")}
    with pytest.raises(ValueError, match=message.format(**hashes)):
        scrimp.generate(tiny("llama"), [1, 2], draft=scrimp.tree_decoding(source(tiny)), max_new_tokens=4)


def test_windows_leave_no_place_for_pseudo_rows(tiny: Tiny) -> None:
    model = tiny("mistral-window")
    with pytest.raises(ValueError, match="HiddenTransfer: the model has layers with windows"):
        scrimp.generate(model, [1, 2], draft=scrimp.tree_decoding(HiddenTransfer(maps(model))), max_new_tokens=4)


def damaged(path: Path, fault: str) -> Path:
    """A copy of the file with a fault."""
    tensors, path = load_file(path), path.with_suffix(".damaged")
    header = {"format": FORMAT, "version": 1, "kind": "hidden", "layer": 1, "offsets": [2, 3, 4], "weight_hash": "x"}
    if fault == "truncated":
        path.write_bytes(path.with_suffix(".maps").read_bytes()[:-9])
    elif fault == "pickle":
        torch.save(tensors, path)
    else:
        changes = {
            "version": {"version": 2},
            "no hash": {"weight_hash": None},
            "offsets": {"offsets": [2, 3]},
            "layer": {"layer": float("inf")},
            "kind": {"kind": "eagle"},
        }
        header |= changes.get(fault, {})
        words = "[" * 100_000 if fault == "nested" else json.dumps(header)
        if fault == "not finite":
            tensors["bias"][0, 0] = torch.inf
        elif fault == "no bias":
            del tensors["bias"]
        elif fault == "shape":
            tensors["bias"] = tensors["bias"][:2].clone()
        elif fault == "order":
            tensors["tokens"] = torch.tensor([3, 3], dtype=torch.int32)
        elif fault == "dtype":
            tensors["weight"] = tensors["weight"].half()
        save_file(tensors, path, metadata={"other" if fault == "other format" else FORMAT: words})
    return path


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "not a file of draft maps, or damaged"),
        ("pickle", "not a file of draft maps, or damaged"),
        ("other format", "not a file of draft maps"),
        ("version", "version 2 of draft maps; this scrimp reads 1"),
        ("no hash", "has no weight hash"),
        ("offsets", r"offsets \[2, 3\] are not \[2, 3, 4\]"),
        ("layer", "layer=inf is not a number of layers"),
        ("nested", "not a file of draft maps, or damaged"),
        ("kind", "kind='eagle' is not 'hidden' or 'medusa'"),
        ("not finite", "bias holds numbers that are not finite"),
        ("no bias", "do not fit: 'bias'"),
        ("shape", r"weight \[3, 48, 48\] and bias \[2, 48\] must be \[k, d, d\] and \[k, d\]"),
        ("dtype", "weight must be float32, got torch.float16"),
        ("order", r"tokens must be int32 \[n\], ascending, from 0 on"),
    ],
)
def test_damaged_files(fault: str, message: str, tiny: Tiny, tmp_path: Path) -> None:
    maps(tiny("llama")).save(tmp_path / "good.maps")
    with pytest.raises(ValueError, match=message):
        HiddenTransfer(damaged(tmp_path / "good.maps", fault))


@pytest.mark.parametrize(("make", "message"), [(HiddenTransfer, "width=0"), (MedusaHeads, "guesses=0")])
def test_bad_settings(make: Any, message: str, tiny: Tiny) -> None:
    name, number = message.split("=")
    with pytest.raises(ValueError, match=message):
        make(maps(tiny("llama")), **{name: int(number)})


def test_what_pseudo_rows_see() -> None:
    """The path to their row, and those of the same row up to themselves."""
    words = torch.tensor([[0b1, 0b11, 0b101]])
    found = ahead.pseudo_words(words, 2)
    assert found.tolist() == [[[0b0001001, 0b0011001], [0b0100011, 0b1100011], [0b010000101, 0b110000101]]]
    full = ahead.pseudo_words(torch.ones(1, 16, dtype=torch.int64), 3)
    assert full[0, 15, 2].item() == (0b111 << 61 | 1) - (1 << 64)


def test_guesses_of_independent_levels() -> None:
    found = _product([[(7, 0.5), (8, 0.4)], [(1, 0.9), (2, 0.05)]], 4, 9)
    assert (found.tokens, found.parents) == ([7, 1, 8, 1], [-1, 0, -1, 2])
    assert len(_product([[(7, 0.5)]] * 3, 9, 2)) == 2


@pytest.mark.parametrize("layer", [0, 1])
def test_pseudo_rows_are_the_models_own(layer: int, tiny: Tiny) -> None:
    """Against the model's code: after a path, the mapped states stand for the next tokens' in the upper layers."""
    model = tiny("llama-biases-tied")
    view, own = decoder_model(model), maps(model, layer=layer)
    text, tree = [3, 1, 4, 1, 5], Tree([9, 2, 6, 5], [-1, 0, 1, 0])
    cache = KVCache(view, 2, 20)
    for b in range(2):
        forward.prefill(cache, b, text, panels=False, patterns=None)
    held = torch.full((2,), len(text), dtype=torch.int32)
    batch = together([tree, tree], torch.device("cpu"))
    with torch.inference_mode():
        states, pseudo = ahead.feed(view, cache, batch, held, held, own)
        plain = forward.rows(
            view, cache.keys, cache.values, batch.tokens, held, positions=5 + batch.depths, ancestors=batch.words
        )
    assert torch.equal(states, plain)
    for row, path in enumerate(([9], [9, 2], [9, 2, 6], [9, 5])):
        wanted = _by_the_models_code(model, text + path, own)
        torch.testing.assert_close(pseudo[1, row], wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def _by_the_models_code(model: PreTrainedModel, text: list[int], own: DraftMaps) -> torch.Tensor:
    base, x = model.model, model.model.embed_tokens(torch.tensor([text]))
    for i, layer in enumerate(base.layers):
        if i == own.layer:
            x = torch.cat([x, own(x[:, -1])], 1)
        x = layer(x, position_embeddings=base.rotary_emb(x, torch.arange(x.shape[1])[None]))
    return x[0, len(text) :]


@pytest.mark.parametrize("kind", ["medusa", "hidden"])
def test_good_maps_save_steps(kind: Any, tiny: Tiny) -> None:
    """A model whose next token is a function of the last one: maps that know it are right every time."""
    model = successor_model(tiny("llama"))
    draft = scrimp.tree_decoding(trained(successor_maps(model, kind)), cost=Free())
    ids = [[3], [9, 10]]
    got = scrimp.generate(model, ids, max_new_tokens=21, draft=draft)
    assert got == scrimp.generate(model, ids, max_new_tokens=21)
    assert got[0].tokens == [(4 + i) % 16 for i in range(21)]
    assert draft.knowledge.steps == 2 * 5  # the first of which has guesses too, from the end of the prompt


def test_good_maps_save_steps_of_custom_generate(tiny: Tiny) -> None:
    model = successor_model(tiny("llama"))
    draft = scrimp.tree_decoding(HiddenTransfer(successor_maps(model, "hidden")), cost=Free())
    how = partial(custom_generate, draft=draft)
    got = model.generate(torch.tensor([[3]]), custom_generate=how, max_new_tokens=21, do_sample=False)
    assert got[0, 1:].tolist() == [(4 + i) % 16 for i in range(21)]
    assert draft.knowledge.steps == 4  # of those that were settled; the last one was not


@pytest.mark.parametrize("head", ["dense", "biased", "exact"])
def test_guesses_are_among_the_tokens_of_the_maps(head: str, tiny: Tiny) -> None:
    """The likeliest of them by the model's own logits."""
    model = copy.deepcopy(tiny("llama"))
    if head == "biased":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(256))
    elif head == "exact":
        scrimp.compress_head(model, "exact")
    view, some = decoder_model(model), [3, 17, 40, 99, 200, 201, 255]
    _, scores = HiddenTransfer(maps(model, tokens=some), width=4).fitted(view)
    states = torch.randn(2, 3, D)
    with torch.inference_mode():
        tokens, chances = scores(states)
        wanted = forward.logits(view, states)[..., some].softmax(-1).topk(4)
    assert tokens == torch.tensor(some)[wanted.indices].tolist()
    torch.testing.assert_close(torch.tensor(chances), wanted.values)


def successor_maps(model: PreTrainedModel, kind: Any) -> DraftMaps:
    """What gives the states of the next three tokens of `successor_model`."""
    shift = torch.eye(16).roll(1, 0)  # one-hot token -> next one
    weight = torch.stack([torch.block_diag(torch.linalg.matrix_power(shift, i), torch.eye(32)) for i in (1, 2, 3)])
    layer = 2 if kind == "medusa" else 1
    return DraftMaps(kind, layer, weight, torch.zeros(3, D), model_hash(decoder_model(model)))


def successor_model(like: PreTrainedModel) -> PreTrainedModel:
    """Token 15 is followed by 0, others by their successor: layers do nothing, the head shifts one-hot embeddings."""
    model = type(like)(like.config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.zero_()[:16, :16] = torch.eye(16)
        model.lm_head.weight.zero_()[:16, :16] = 10 * torch.eye(16).roll(1, 0)
    return model.eval()
