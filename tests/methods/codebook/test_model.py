"""add_codebooks: where the layers go, what they change in generate and training, and that they go away again."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import scrimp
from scrimp.methods.codebook import PLACES, codebook_loss, codebooks
from scrimp.methods.generation.huggingface import UnsupportedModelError
from scrimp.ops import codebook_topk

TEXT = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(5))
SITES = {"block": "", "attention": ".self_attn", "mlp": ".mlp", "heads": ".self_attn.o_proj"}


@pytest.fixture
def model(tiny: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """A copy of the tiny Llama: two layers, 48 numbers, six heads of eight."""
    return copy.deepcopy(tiny("llama"))


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(TEXT).logits


@pytest.mark.parametrize("where", PLACES)
def test_places(model: PreTrainedModel, where: str) -> None:
    before = logits(model)
    layers = scrimp.add_codebooks(model, where, codes=30, k=3, tokens=TEXT)
    assert list(layers) == [f"model.layers.{i}{SITES[where]}" for i in range(2)]
    assert codebooks(model) == layers
    shape = (6, 30, 8) if where == "heads" else (30, 48)
    for layer in layers.values():
        assert layer.codebook.shape == shape
        assert not layer.training
    after = logits(model)
    for layer in layers.values():
        assert layer.index.shape == (3, 40, *shape[:-2], 3)
    assert not torch.equal(after, before)
    assert f"model.layers.1{SITES[where]}.codebook.codebook" in model.state_dict()
    assert scrimp.remove_codebooks(model) == 2
    assert torch.equal(logits(model), before)
    assert not codebooks(model)
    assert not any("codebook" in name for name in model.state_dict())


@pytest.mark.parametrize("where", PLACES)
def test_replaces_what_the_module_gives(model: PreTrainedModel, where: str) -> None:
    """What flows on is the mean of the codes that suit what flowed there before."""
    seen: dict[str, Tensor] = {}
    name = f"model.layers.0{SITES[where]}"
    module = model.get_submodule(name)

    def look(key: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...] | None = None) -> None:
            value = args[0] if out is None else out
            seen[key] = value[0] if isinstance(value, tuple) else value

        return hook

    register = module.register_forward_pre_hook if where == "heads" else module.register_forward_hook
    register(look("before"))
    layer = scrimp.add_codebooks(model, where, codes=30, k=3, layers=[0], tokens=TEXT)[name]
    register(look("after"))
    logits(model)
    expected, index, _ = codebook_topk(seen["before"], layer.codebook.detach(), 3)
    assert torch.equal(seen["after"], expected)
    assert torch.equal(layer.index, index)


def test_as_many_codes_as_states_change_nothing_much(model: PreTrainedModel) -> None:
    """Every activation has a code of its own: the logits are those of the model."""
    before = logits(model)
    scrimp.add_codebooks(model, "mlp", codes=TEXT.numel(), k=1, tokens=TEXT, layers=[0], euclidean=True)
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("where", PLACES)
def test_generate(model: PreTrainedModel, where: str) -> None:
    """With a cache, token by token, the codes are those of the whole text read at once; hooks reach into it."""
    layers = scrimp.add_codebooks(model, where, codes=20, k=3, tokens=TEXT)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = model.generate(TEXT[:1], **how)
    assert text.shape == (1, 48)
    assert torch.equal(model.generate(TEXT[:1], use_cache=False, **how), text)
    last = next(reversed(layers.values()))
    for group in range(last.groups):
        last.force([1, 2, 3], group)
    model.generate(TEXT[:1], **how)
    assert last.index.view(-1, 3).tolist() == [[1, 2, 3]] * last.groups
    last.release()
    assert torch.equal(model.generate(TEXT[:1], **how), text)


def test_our_own_loop_refuses(model: PreTrainedModel) -> None:
    """It does not call the modules; without the layers it runs again."""
    scrimp.add_codebooks(model, "mlp", codes=10, k=2)
    with pytest.raises(UnsupportedModelError, match=r"codebook|hooks"):
        scrimp.generate(model, [1, 2, 3], max_new_tokens=2)
    scrimp.remove_codebooks(model)
    assert len(scrimp.generate(model, [1, 2, 3], max_new_tokens=2).tokens) == 2


@pytest.mark.parametrize("learn", ["task", "commitment"])
def test_training_from_scratch(model: PreTrainedModel, learn: str) -> None:
    """Random codes, trained with the rest of the model frozen, come closer to the model's own loss."""
    model.requires_grad_(False)
    layers = scrimp.add_codebooks(model, "mlp", codes=40, k=4, learn=learn)
    model.train()
    optimizer = torch.optim.Adam([layer.codebook for layer in layers.values()], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(TEXT, labels=TEXT).loss
        optimizer.zero_grad()
        (loss + codebook_loss(model)).backward()
        optimizer.step()
        losses.append(float(loss.detach() if learn == "task" else codebook_loss(model).detach()))
    assert losses[-1] < losses[0]
    assert all(int(layer.counts.sum()) == 12 * TEXT.numel() * 4 for layer in layers.values())


def test_gradients_reach_the_model(model: PreTrainedModel) -> None:
    scrimp.add_codebooks(model, "block", codes=40, k=4)
    assert float(codebook_loss(model)) == 0.0
    model(TEXT, labels=TEXT).loss.backward()
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if "embed" in name or "codebook" in name)


def test_copies(model: PreTrainedModel) -> None:
    """A copy has layers of its own, which can be taken out of it alone."""
    before = logits(model)
    scrimp.add_codebooks(model, "mlp", codes=10, k=2, tokens=TEXT)
    with_codes, other = logits(model), copy.deepcopy(model)
    codebooks(other)["model.layers.0.mlp"].disable(range(8))
    assert torch.equal(logits(model), with_codes)
    assert not torch.equal(logits(other), with_codes)
    assert scrimp.remove_codebooks(other) == 2
    assert torch.equal(logits(other), before)
    assert torch.equal(logits(model), with_codes)


def test_state_dict_of_another_model(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    scrimp.add_codebooks(model, "heads", codes=10, k=2, tokens=TEXT)
    scrimp.add_codebooks(other, "heads", codes=10, k=2, seed=9)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("where", PLACES)
def test_other_names_of_parts(where: str) -> None:
    """GPT-2: attn, c_proj, layers that return tuples."""
    model = gpt2()
    before = logits(model)
    layers = scrimp.add_codebooks(model, where, codes=12, k=2, tokens=TEXT)
    assert len(layers) == 2
    assert next(iter(layers.values())).codebook.shape == ((4, 12, 8) if where == "heads" else (12, 32))
    assert not torch.equal(logits(model), before)
    scrimp.remove_codebooks(model)
    assert torch.equal(logits(model), before)


def test_named_modules(model: PreTrainedModel) -> None:
    names = ["model.norm", "model.layers.1.mlp.up_proj"]
    layers = scrimp.add_codebooks(model, names, codes=8, k=2, groups=2)
    assert [tuple(layer.codebook.shape) for layer in layers.values()] == [(2, 8, 24), (2, 8, 32)]
    logits(model)
    assert all(layer.index is not None for layer in layers.values())


BAD = {
    "place": ({"where": "head"}, "where='head' must be one of block, attention, mlp, heads"),
    "module": ({"where": ["model.layer.0"]}, "the model has no module 'model.layer.0'"),
    "layers of names": ({"where": ["model.norm"], "layers": [0]}, r"layers=\[0\] cannot be chosen"),
    "layer": ({"layers": [2]}, "layer 2 is not one of the 2 layers"),
    "k": ({"k": 11}, "k=11 must be from 1 to the 10 codes"),
    "groups": ({"groups": 5}, "groups=5 must divide the 48 numbers"),
    "codes": ({"codes": 121, "tokens": TEXT}, "codes=121 must be from 1 to the 120 rows"),
    "tokens": ({"tokens": TEXT[0]}, r"tokens must be ids \[B, n\], at least one, got int64 \[40\]"),
    "no tokens": ({"tokens": TEXT[:0]}, r"got int64 \[0, 40\]"),
    "learn": ({"learn": "much"}, "learn='much' must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model: PreTrainedModel, case: str) -> None:
    """Nothing is left in the model."""
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.add_codebooks(model, **{"where": "mlp", "codes": 10, "k": 2} | changes)
    assert not codebooks(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_twice_is_refused(model: PreTrainedModel) -> None:
    scrimp.add_codebooks(model, "mlp", codes=10, k=2, layers=[1])
    with pytest.raises(ValueError, match=r"model.layers.1.mlp has codes already"):
        scrimp.add_codebooks(model, "mlp", codes=10, k=2)


def test_a_model_without_such_parts() -> None:
    with pytest.raises(ValueError, match="no list of decoder layers"):
        scrimp.add_codebooks(torch.nn.Linear(3, 3), "mlp")
