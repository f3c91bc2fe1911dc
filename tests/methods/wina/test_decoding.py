"""Sparse models in the decoding loop and in Hugging Face's own generate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scrimp.benchmarks.tree_exact import Free, always, recorded
from torch import Tensor

import scrimp
from scrimp import Calibration, KVCache
from scrimp.methods.evaluate import Reader, quality
from scrimp.methods.generation import DecoderModel, decoder_model, forward
from scrimp.methods.generation.loop import step
from scrimp.methods.tree_decoding import SelfDraft
from scrimp.methods.wina import METHODS, metered
from scrimp.testing import same_bits

Calibrated = Callable[[str], tuple[Any, Calibration]]
PROMPTS = torch.randint(1, 256, (2, 11), generator=torch.Generator().manual_seed(3))


def sparse(calibrated: Calibrated, family: str = "llama", method: str = "wina", sparsity: float = 0.5) -> Any:
    model, calibration = calibrated(family)
    scrimp.sparsify(model, calibration, sparsity, method)
    return model


def stock(model: Any, new: int) -> list[list[int]]:
    whole = torch.ones_like(PROMPTS)
    found = model.generate(
        PROMPTS, attention_mask=whole, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=256
    )
    return found[:, PROMPTS.shape[1] :].tolist()


def tokens(model: Any, prompts: Any = PROMPTS, new: int = 12, **options: Any) -> list[list[int]]:
    found: Any = scrimp.generate(model, prompts, max_new_tokens=new, **options)
    return [each.tokens for each in found]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "cats"])
@pytest.mark.parametrize("family", ["llama-biases-tied", "mistral-window", "qwen2", "qwen3"])
def test_the_loop_and_stock_generate_agree(family: str, method: str, calibrated: Calibrated) -> None:
    model = sparse(calibrated, family, method)
    with metered(model) as usage:
        found = tokens(model)
    assert found == stock(model, 12)
    assert 0.3 < usage.dropped < 0.7
    assert all(layer.bytes_saved > 0 for layer in usage.layers())
    assert found != tokens(calibrated(family)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama-biases-tied", "qwen2", "qwen3"])
def test_layers_in_one_call_have_the_bits_of_their_ops(
    family: str, dtype: torch.dtype, calibrated: Calibrated, same_in_one_call: Callable[[DecoderModel], None]
) -> None:
    view = decoder_model(sparse(calibrated, family, "wina-centred").to(dtype))
    for model in (view, view.for_prompts):
        same_in_one_call(model)


@pytest.mark.parametrize(
    "options", [{"method": "wina-rotated"}, {"method": "cats", "sparsity": 0.2}, {"max_error": 0.5}]
)
def test_what_the_call_does_not_know_goes_op_by_op(options: dict[str, Any], calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    scrimp.sparsify(model, calibration, **options)
    view = decoder_model(model)
    assert view.packed(range(len(view.layers))) is None
    assert (view.for_prompts.packed(range(len(view.layers))) is None) == ("method" in options)


def test_meters_see_every_call(calibrated: Calibrated) -> None:
    """Also of a view that has run before without one, and will afterwards."""
    view = decoder_model(model := sparse(calibrated))
    which, expected = range(len(view.layers)), tokens(view)
    assert view.packed(which) is not None
    with metered(model) as usage:
        assert view.packed(which) is None
        assert tokens(view) == expected
    assert view.packed(which) is not None
    assert 0.3 < usage.dropped < 0.7
    counted = [meter.rows for _, meter in usage.meters.values()]
    assert counted == [2 * 11] * 14  # of 12 tokens each, the first comes of the prompt
    assert tokens(view) == expected
    assert [meter.rows for _, meter in usage.meters.values()] == counted


def test_a_sequence_does_not_depend_on_its_company(calibrated: Calibrated) -> None:
    """The keys and values of prompts and decoded tokens have the same bits alone and together."""
    model = sparse(calibrated, "qwen2", "wina-centred")
    together, alone = KVCache(model, 2, 32), [KVCache(model, 1, 32) for _ in PROMPTS]
    tokens(model, cache=together)
    for b, cache in enumerate(alone):
        tokens(model, PROMPTS[b : b + 1], cache=cache)
        held = len(cache.tokens[0])
        assert together.tokens[b] == cache.tokens[0]
        assert torch.equal(together.memory[:, :, b, :, :held], cache.memory[:, :, 0, :, :held])


def test_trees_give_the_same_tokens(calibrated: Calibrated) -> None:
    model = sparse(calibrated)
    prompts = PROMPTS.repeat(1, 3)
    draft = scrimp.tree_decoding()
    assert tokens(model, prompts, 24, draft=draft) == tokens(model, prompts, 24)


@pytest.mark.parametrize("method", ["wina", "wina-centred", "wina-rotated", "cats"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "drawn"])
def test_a_sparse_draft_loses_nothing(settings: dict[str, Any], method: str, calibrated: Calibrated) -> None:
    """Guesses of the sparse model, judged by the dense one on the same weights: the dense one's tokens and bits."""
    view = decoder_model(sparse(calibrated, method=method, sparsity=0.2))
    whole, ids, asked = view.for_prompts, PROMPTS.tolist(), {"max_new_tokens": 24, **settings}
    expected, logits = recorded(whole, ids, None, **asked)
    draft = scrimp.tree_decoding(*always([SelfDraft(view)]), cost=Free())
    found, seen = recorded(whole, ids, draft, **asked)
    assert found == expected == scrimp.generate(whole, ids, draft=scrimp.tree_decoding(SelfDraft(view)), **asked)
    assert len(seen) > 24
    assert all(same_bits(row, logits[text]) for text, row in seen.items())
    judged, right = draft.report()["self"]
    assert judged > 0
    assert right > 0
    assert draft.tokens_per_step > 1.5


def test_prompts_are_read_densely(calibrated: Calibrated) -> None:
    """In rows and in panels: what a prompt leaves behind is the same at any sparsity."""
    memories = []
    for sparsity in (0.2, 0.99):
        model = sparse(calibrated, sparsity=sparsity)
        for n in (30, 600):
            cache = KVCache(model, 1, n + 1)
            forward.prefill(cache, 0, [1 + i % 250 for i in range(n)], panels=True, patterns=None)
            memories.append(cache.memory[..., :n, :])
    assert torch.equal(memories[0], memories[2])
    assert torch.equal(memories[1], memories[3])


def test_decoded_tokens_are_read_again_in_a_longer_prompt(calibrated: Calibrated) -> None:
    """They skipped channels, which a prompt's tokens do not; so the text goes on as without the cache."""
    model = sparse(calibrated, sparsity=0.7)
    for b in (0, 1):
        cache = KVCache(model, 1, 64)
        prompt = PROMPTS[b].tolist()
        (first,) = tokens(model, [prompt], 8, cache=cache)
        longer = [[*prompt, *first, 5, 6]]
        assert cache.prompts == [len(prompt)]
        assert tokens(model, longer, 8, cache=cache) == tokens(model, longer, 8)
        assert cache.prompts == [len(longer[0])]


def test_dense_models_read_prompts_themselves(calibrated: Calibrated) -> None:
    view = decoder_model(calibrated("llama")[0])
    assert view.for_prompts is view


@torch.inference_mode()
def decoded(model: Any, window: Tensor) -> Tensor:
    """Logits after each token of a window, of which the first is the prompt."""
    cache = KVCache(model, 1, len(window))
    states = [forward.prefill(cache, 0, window[:1].tolist(), panels=True, patterns=None)]
    states += [step(cache, [int(token)]) for token in window[1:]]
    return forward.logits(cache.model, torch.cat(states)[:, 0])  # type: ignore[arg-type]


def test_quality_is_that_of_decoding(calibrated: Calibrated) -> None:
    model = sparse(calibrated)
    reader, window = Reader(model), torch.randint(1, 256, (150,), generator=torch.Generator().manual_seed(1))
    logits = decoded(model, window)
    assert torch.equal(reader.logits(reader.states(window)), logits)
    found, _ = quality(reader, window[None])
    expected = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
    torch.testing.assert_close(found.nll[0], expected)


def test_sparse_attention_in_windows_is_refused(calibrated: Calibrated) -> None:
    patterns = scrimp.HeadPatterns(torch.full((2, 6), 64).int(), torch.zeros(2, 6).int())
    with pytest.raises(ValueError, match="patterns are for prompts"):
        Reader(sparse(calibrated), patterns)
