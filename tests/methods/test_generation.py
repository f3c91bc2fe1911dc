"""The decoding loop against Hugging Face's own code, and everything that a generation can be asked for."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import scrimp
from scrimp.methods.generation import KVCache, Linear, Piece, UnsupportedModelError, decoder_model, forward, stream
from scrimp.methods.generation.text import TextStream

Tiny = Callable[[str], PreTrainedModel]
FAMILIES = [
    "llama",
    "llama-biases-tied",
    "llama-rope-llama3",
    "llama-rope-yarn",
    "llama-gelu-ungrouped",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-some-windows",
    "qwen3",
]


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def all_logits(model: PreTrainedModel, tokens: list[int], panels: bool) -> torch.Tensor:
    view = decoder_model(model)
    cache = KVCache(view, 1, len(tokens))
    grid = len(tokens) // forward.PANEL * forward.PANEL if panels else 0
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        states = [
            forward.advance(cache, 0, ids[:, first:end], first, end <= grid)
            for first, end in forward.spans(0, grid, len(tokens))
        ]
        return forward.logits(view, torch.cat(states, 1))[0].clone()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("panels", [True, False])
def test_logits_are_those_of_hugging_face(family: str, panels: bool, tiny: Tiny) -> None:
    model, tokens = tiny(family), prompt(600)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
        exact = copy.deepcopy(model).double()(torch.tensor([tokens])).logits[0]
    got = all_logits(model, tokens, panels)
    bound = 3 * (expected.double() - exact).abs().max() + 1e-6
    assert (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_logits(family: str, tiny: Tiny) -> None:
    plain, tokens = tiny(family), prompt(150)
    model = copy.deepcopy(plain).bfloat16()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
        exact = copy.deepcopy(model).float()(torch.tensor([tokens])).logits[0]
    got = all_logits(model, tokens, True)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().mean() <= 1.5 * (expected - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_hugging_face(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    for n in (1, 5, 100):
        tokens = prompt(n, seed=n)
        expected = model.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False)[0, n:].tolist()
        assert scrimp.generate(model, tokens, max_new_tokens=24).tokens == expected


def test_batches_are_ragged(tiny: Tiny) -> None:
    model = tiny("llama")
    prompts = [prompt(n, seed=n) for n in (1, 70, 8, 513)]
    alone = [scrimp.generate(model, tokens, max_new_tokens=9) for tokens in prompts]
    assert scrimp.generate(model, prompts, max_new_tokens=9) == alone
    assert [c.reason for c in alone] == ["length"] * 4
    assert [c.prompt_tokens for c in alone] == [1, 70, 8, 513]


def test_every_form_of_prompt(tiny: Tiny, tokenizer: Any) -> None:
    model, tokens = tiny("llama"), [10, 20, 30]
    expected = scrimp.generate(model, tokens, max_new_tokens=4)
    assert scrimp.generate(model, torch.tensor(tokens), max_new_tokens=4) == expected
    assert scrimp.generate(model, torch.tensor([tokens, tokens]), max_new_tokens=4) == [expected] * 2
    padded = {
        "input_ids": torch.tensor([[0, *tokens], [7, *tokens]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
    }
    assert scrimp.generate(model, padded, max_new_tokens=4)[0] == expected
    text = tokenizer.decode(tokens)
    assert scrimp.generate(model, text, tokenizer, max_new_tokens=4).tokens == expected.tokens
    both = scrimp.generate(model, [text, text], tokenizer, max_new_tokens=4)
    assert both[1].text == tokenizer.decode(expected.tokens)
    many = scrimp.generate(model, [tokens] * 66, max_new_tokens=2, temperature=1.0, seed=list(range(66)))
    assert many[65].tokens == scrimp.generate(model, tokens, max_new_tokens=2, temperature=1.0, seed=65).tokens


def test_ends(tiny: Tiny, tokenizer: Any) -> None:
    model, tokens = tiny("llama"), prompt(20)
    free = scrimp.generate(model, tokens, tokenizer, max_new_tokens=20)
    third = free.tokens[2]
    last = free.tokens.index(third) + 1
    stopped = scrimp.generate(model, tokens, max_new_tokens=20, stop_ids=[third])
    assert (stopped.tokens, stopped.reason) == (free.tokens[:last], "stop")
    later = scrimp.generate(model, tokens, max_new_tokens=20, stop_ids=[third], min_new_tokens=5)
    assert third not in later.tokens[:5]
    ended = copy.deepcopy(model)
    ended.generation_config.eos_token_id = [third, 255]
    assert scrimp.generate(ended, tokens, max_new_tokens=20).reason == "eos"
    assert scrimp.generate(ended, tokens, max_new_tokens=20, ignore_eos=True).tokens == free.tokens


def test_stop_strings_are_never_shown(tiny: Tiny, tokenizer: Any) -> None:
    model, tokens = tiny("llama"), prompt(20, seed=4)
    free = scrimp.generate(model, tokens, tokenizer, max_new_tokens=30)
    for first in range(4, 12):
        stop = free.text[first : first + 3]
        where = free.text.index(stop)
        pieces = list(stream(model, tokens, tokenizer, max_new_tokens=30, stop=[stop, "not there"]))
        assert "".join(piece.text for piece in pieces) == free.text[:where]
        assert pieces[-1].reason == "stop"


def test_text_comes_in_whole_characters(tokenizer: Any) -> None:
    text = "naïve ☃ 🎈 end"
    shown = TextStream(tokenizer, [], ["🎈"])
    ids = tokenizer(text)["input_ids"]
    pieces = [shown.push(token) for token in tokenizer("naïve ☃ 🎈")["input_ids"]]
    assert "".join(pieces) == "naïve ☃ "
    assert shown.stopped
    assert all("\ufffd" not in piece for piece in pieces)
    broken = TextStream(tokenizer, [], [])
    assert broken.push(ids[2]) == ""
    assert broken.finish() == "\ufffd"
    never = TextStream(tokenizer, [], [])
    assert [never.push(ids[2]) for _ in range(9)] == [""] * 7 + ["\ufffd" * 8, ""]


def test_context_limits(tiny: Tiny) -> None:
    model = tiny("llama")
    cache = KVCache(decoder_model(model), 1, 30)
    full = scrimp.generate(model, prompt(25), max_new_tokens=20, cache=cache)
    assert (len(full.tokens), full.reason) == (5, "context")
    with pytest.raises(ValueError, match="prompt 0 has 30 tokens, but the cache is of 30"):
        scrimp.generate(model, prompt(30), max_new_tokens=1, cache=cache)
    with pytest.raises(ValueError, match="prompt 0 has 2048 tokens, but the model's context is of 2048"):
        scrimp.generate(model, prompt(2048), max_new_tokens=1)
    with pytest.raises(ValueError, match="capacity=4096 exceeds the model's context of 2048"):
        KVCache(decoder_model(model), 1, 4096)
    assert scrimp.generate(model, prompt(30), max_new_tokens=0, cache=cache).tokens == []


def test_logits_processors(tiny: Tiny) -> None:
    """Those of transformers and plain callables; the ids they see are prompt and new tokens."""
    model, tokens = tiny("llama"), prompt(30)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)])
    expected = model.generate(
        torch.tensor([tokens]), max_new_tokens=20, do_sample=False, repetition_penalty=1.5, no_repeat_ngram_size=2
    )
    got = scrimp.generate(model, [tokens, tokens[:5]], max_new_tokens=20, processors=[processors])
    assert got[0].tokens == expected[0, 30:].tolist()
    seen: list[list[int]] = []

    def only_seven(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    assert scrimp.generate(model, [1, 2], max_new_tokens=3, processors=[only_seven]).tokens == [7, 7, 7]
    assert seen == [[1, 2], [1, 2, 7], [1, 2, 7, 7]]
    with pytest.raises(ValueError, match="no token is left"):
        scrimp.generate(model, [1, 2], processors=[lambda ids, logits: torch.full_like(logits, -torch.inf)])


def test_streams_and_callback(tiny: Tiny) -> None:
    model, prompts = tiny("qwen3"), [prompt(4), prompt(40)]
    expected = scrimp.generate(model, prompts, max_new_tokens=6)
    seen: list[Piece] = []
    assert scrimp.generate(model, prompts, max_new_tokens=6, callback=seen.append) == expected
    assert seen == list(stream(model, prompts, max_new_tokens=6))
    assert [[p.token for p in seen if p.sequence == b] for b in (0, 1)] == [c.tokens for c in expected]
    assert [p.reason for p in seen] == [None] * 10 + ["length"] * 2


def test_a_cancelled_generation_leaves_the_cache_usable(tiny: Tiny) -> None:
    model, tokens = tiny("llama"), prompt(40)
    expected = scrimp.generate(model, tokens, max_new_tokens=12)
    cache = KVCache(decoder_model(model), 1, 100)
    pieces = stream(model, tokens, max_new_tokens=12, cache=cache)
    begun = [next(pieces).token for _ in range(5)]
    with pytest.raises(RuntimeError, match="in use by another generation"):
        scrimp.generate(model, tokens, cache=cache)
    pieces.close()  # type: ignore[attr-defined]
    assert cache.tokens[0] == tokens + begun[:4]
    assert scrimp.generate(model, tokens, max_new_tokens=12, cache=cache) == expected

    def fail(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("a processor's own mistake")

    with pytest.raises(KeyError):
        scrimp.generate(model, prompt(50, 1), cache=cache, processors=[fail])
    assert scrimp.generate(model, tokens, max_new_tokens=12, cache=cache) == expected


def test_a_cache_is_for_its_model_and_weights(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    cache = KVCache(decoder_model(model), 1, 50)
    scrimp.generate(model, [1, 2, 3], max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match="the cache is for 1 sequences, but there are 2"):
        scrimp.generate(model, [[1], [2]], cache=cache)
    with pytest.raises(ValueError, match="filled by another model, or its weights have changed"):
        scrimp.generate(tiny("llama"), [1, 2, 3], cache=cache)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="its weights have changed"):
        scrimp.generate(model, [1, 2, 3], cache=cache)


def test_parameters_are_not_copied(tiny: Tiny) -> None:
    model = tiny("qwen2")
    view = decoder_model(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    layer = view.layers[1]
    held = [view.embedding, view.norm.weight, layer.attention_norm.weight, layer.mlp_norm.weight]
    for linear in (layer.qkv, layer.o, layer.gate_up, layer.down, view.head):
        held += [*linear.weights, *(b for b in linear.biases if b is not None)]  # type: ignore[attr-defined]
    assert {tensor.data_ptr() for tensor in held} <= own


class Halves(torch.nn.Module):
    """A linear of another kind: keeps half its weight and plugs into the loop by `engine_linear`."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.stored = torch.nn.Parameter(linear.weight.detach() / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (2 * self.stored).T

    @staticmethod
    def engine_linear(modules: Sequence["Halves"]) -> Linear:
        class Run:
            sizes = tuple(module.stored.shape[0] for module in modules)

            def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
                calls.append(len(modules))
                return scrimp.ops.linear(x, [2 * module.stored for module in modules], None, residual)

        return Run()


calls: list[int] = []


def test_other_linears_plug_in(tiny: Tiny) -> None:
    """Alone, fused with their kind, and beside a dense one; the loop does not know."""
    plain = tiny("llama")
    model = copy.deepcopy(plain)
    for layer in model.model.layers:
        layer.self_attn.k_proj = Halves(layer.self_attn.k_proj)
        layer.mlp.gate_proj, layer.mlp.up_proj = Halves(layer.mlp.gate_proj), Halves(layer.mlp.up_proj)
        layer.mlp.down_proj = Halves(layer.mlp.down_proj)
    calls.clear()
    tokens = prompt(70)
    assert scrimp.generate(model, tokens, max_new_tokens=10).tokens == (
        scrimp.generate(plain, tokens, max_new_tokens=10).tokens
    )
    assert calls[:6] == [1, 2, 1] * 2


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_subclass(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = Doubled(48, 48)


def with_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def with_patched_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def with_dynamic_rope(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def with_other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def with_half_of_it_in_bf16(model: Any) -> None:
    model.model.layers[0].bfloat16()


def with_halves(model: Any) -> None:
    model.half()


def with_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = 30.0


REFUSED = {
    with_subclass: "its module 'model.layers.1.self_attn.q_proj' is a .*Doubled",
    with_hook: "'model.layers.0' has forward hooks",
    with_patched_forward: "the forward of its module 'model.layers.0.mlp' has been replaced",
    with_dynamic_rope: "rope type 'dynamic' is not one of default, linear, llama3, yarn",
    with_other_activation: "its module .*act_fn.* is a|activation ReLU is not SiLU or GELU",
    with_half_of_it_in_bf16: "its parameters are bfloat16 and float32",
    with_halves: "its parameters are float16",
    with_softcap: "it has final_logit_softcapping=30.0",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_is_not_understood_is_refused(change: Callable[[Any], None], tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    change(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED[change]) as error:
        scrimp.generate(model, [1, 2])
    assert "It runs Llama (SmolLM2 among them), Mistral, Qwen2 and Qwen3" in str(error.value)


def test_hooks_that_transformers_leaves_behind_do_no_harm(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert scrimp.generate(model, [1, 2], max_new_tokens=2) == scrimp.generate(tiny("llama"), [1, 2], max_new_tokens=2)


def test_other_families_are_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UnsupportedModelError, match="cannot run this GPT2LMHeadModel: its model type is 'gpt2'"):
        scrimp.generate(other, [1, 2])
    with pytest.raises(UnsupportedModelError, match="cannot run this Linear: its model type is None"):
        scrimp.generate(torch.nn.Linear(1, 1), [1, 2])


MISTAKES = {
    "max_new_tokens=-1 must be at least 0": {"max_new_tokens": -1},
    "min_new_tokens=9 exceeds max_new_tokens=3": {"min_new_tokens": 9, "max_new_tokens": 3},
    "chunk=0 must be at least 1": {"chunk": 0},
    "temperature=-1.0 must be finite": {"temperature": -1.0},
    "top_p=0.0 must be above 0": {"top_p": 0.0},
    "top_k=-2 must not be negative": {"top_k": -2},
    "min_p=1.5 must be from 0 to 1": {"min_p": 1.5},
    "prefill='fast' is not 'panels' or 'rows'": {"prefill": "fast"},
    "stop strings need a tokenizer": {"stop": "x"},
    "an empty string would end every text": {"stop": ["a", ""]},
    r"the patterns are for 3 layers of 4 heads, but the model has 2 layers of 6 heads": {
        "patterns": scrimp.HeadPatterns(torch.zeros(3, 4).int(), torch.zeros(3, 4).int())
    },
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=message):
        scrimp.generate(tiny("llama"), [1, 2], **MISTAKES[message])


def test_mistaken_prompts(tiny: Tiny) -> None:
    model = tiny("llama")
    for wrong, message in (
        ([], "prompt 0 has no tokens"),
        ([[1], [1, 256]], "prompt 1 has token 256; ids are below 256"),
        ([[-1, 4]], "prompt 0 has token -1"),
        ("text", "a prompt that is text needs a tokenizer"),
        (torch.zeros(3), r"prompts must be token ids \[n\] or \[B, n\], got float32 \[3\]"),
        ({"attention_mask": 1}, "prompts has no 'input_ids'"),
    ):
        with pytest.raises(ValueError, match=message):
            scrimp.generate(model, wrong)
    with pytest.raises(ValueError, match="seed has 3 numbers for 2 sequences"):
        scrimp.generate(model, [[1], [2]], seed=[1, 2, 3])


def test_nan_weights_are_said(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="is NaN: the model's weights or inputs are broken"):
            scrimp.generate(model, [1, 2], temperature=temperature)
