"""What the bits of a token's logits depend on: its tokens (in panels also which are the prompt); nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import scrimp
from scrimp import _ext
from scrimp.methods.generation import DecoderModel, KVCache, decoder_model, forward, stream
from scrimp.methods.generation.loop import step

Tiny = Callable[[str], PreTrainedModel]
ISAS = _ext.available_isas()


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def filled(model: DecoderModel, prompts: list[list[int]], capacity: int) -> KVCache:
    cache = KVCache(model, len(prompts), capacity)
    cache.memory.fill_(torch.nan)
    for b, tokens in enumerate(prompts):
        forward.prefill(cache, b, tokens, panels=False, patterns=None)
    return cache


@torch.inference_mode()
def in_one_go(cache: KVCache, b: int, tokens: list[int]) -> Tensor:
    """Logits `[T, V]` of T new tokens fed as T rows."""
    keys, values = cache.of_sequence(b)
    start = torch.tensor([len(cache.tokens[b])], dtype=torch.int32)
    state = forward.rows(cache.model, keys, values, torch.tensor([tokens]), start)
    return forward.logits(cache.model, state)[0].clone()


@torch.inference_mode()
def one_by_one(cache: KVCache, b: int, tokens: list[int]) -> Tensor:
    """The same, with one token of one sequence of the cache a step; the other sequences idle or go along."""
    found = []
    for t, token in enumerate(tokens):
        fed: list[int | None] = [None if other % 3 == 2 else 1 + 7 * t + other for other in range(cache.batch)]
        fed[b] = token
        found.append(forward.logits(cache.model, step(cache, fed))[b, 0].clone())
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_layers_in_one_call_have_the_bits_of_their_ops(tiny: Tiny, family: str) -> None:
    model = decoder_model(tiny(family))
    assert model.packed(range(len(model.layers))) is not None
    apart = replace(model, packing=False)
    assert apart.packed(range(len(model.layers))) is None
    prompts = [prompt(9), prompt(21, 1)]
    one, other = filled(model, prompts, 40), filled(apart, prompts, 40)
    for token in (3, 200, 17):
        state, expected = step(one, [token, token + 1]), step(other, [token, token + 1])
        assert torch.equal(state, expected)
    for b, tokens in enumerate(one.tokens):
        assert torch.equal(one.memory[:, :, b, :, : len(tokens)], other.memory[:, :, b, :, : len(tokens)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama-biases-tied", "qwen3", "mistral-window"])
def test_logits_do_not_depend_on_company(family: str, isa: str, dtype: torch.dtype, tiny: Tiny) -> None:
    """Alone, in a batch of four, within 16 rows, with one thread and two: the same bits."""
    import copy

    model = decoder_model(copy.deepcopy(tiny(family)).to(dtype))
    before, new = prompt(90, 1), prompt(16, 2)
    others = [prompt(n, n) for n in (3, 200, 64)]
    with _ext.use_isa(isa):
        alone = one_by_one(filled(model, [before], 300), 0, new)
        assert alone.isfinite().all()
        batch = filled(model, [others[0], before, *others[1:]], 300)
        assert torch.equal(one_by_one(batch, 1, new), alone)
        assert torch.equal(in_one_go(filled(model, [before], 300), 0, new), alone)
        with threads(2):
            assert torch.equal(in_one_go(filled(model, [before], 300), 0, new), alone)
            assert torch.equal(one_by_one(filled(model, [before], 300), 0, new), alone)


PROMPTS = [prompt(n, n) for n in (5, 64, 515, 1100)]
DRAWN = {"temperature": 0.9, "seed": 11}
HOW = {**DRAWN, "top_k": 40, "max_new_tokens": 12}


@pytest.mark.parametrize("prefill", ["panels", "rows"])
def test_text_does_not_depend_on_batch_or_chunks(prefill: str, tiny: Tiny) -> None:
    model = decoder_model(tiny("llama"))
    alone = [scrimp.generate(model, tokens, prefill=prefill, **HOW) for tokens in PROMPTS]
    assert scrimp.generate(model, PROMPTS, prefill=prefill, **HOW) == alone
    assert len({tuple(completion.tokens) for completion in alone}) == 4
    for chunk in (1, 100, 512, 700):
        some = PROMPTS[:2] if chunk == 1 else PROMPTS
        assert scrimp.generate(model, some, prefill=prefill, chunk=chunk, **HOW) == alone[: len(some)]


@pytest.mark.parametrize("prefill", ["panels", "rows"])
def test_the_state_after_a_prompt_does_not_depend_on_history(prefill: str, tiny: Tiny) -> None:
    """Turns of a conversation, a prompt taken back, another one in between: all bits are a fresh one's."""
    model, panels = decoder_model(tiny("qwen3")), prefill == "panels"
    text = prompt(1300, 5)
    cache = KVCache(model, 1, 1310)
    cache.memory.fill_(torch.nan)
    cut = [300, 520, 519, 1100, 1024, 1025, 600, 1300, 200]
    for turn, n in enumerate(cut):
        tokens = text[:n] if turn != 4 else [*text[:700], 1, 2, *text[702:n]]
        pieces = stream(model, tokens, max_new_tokens=4, prefill=prefill, cache=cache)
        for _ in range(3):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        cache.keep(0, n)
        fresh = KVCache(model, 1, 1310)
        state = forward.prefill(fresh, 0, tokens, panels=panels, patterns=None)
        assert torch.equal(cache.memory[..., : n - 1, :], fresh.memory[..., : n - 1, :]), f"turn {turn}"
        again = forward.prefill(cache, 0, tokens, panels=panels, patterns=None)
        assert torch.equal(again, state), f"turn {turn}"
    assert cache.panels[0][0] == 0  # 200 tokens are no panel


def test_rows_make_logits_a_function_of_tokens_alone(tiny: Tiny) -> None:
    """With prefill="rows" it does not matter where the prompt ended and generation began."""
    model = decoder_model(tiny("llama"))
    first = scrimp.generate(model, prompt(600, 3), max_new_tokens=20, prefill="rows", **DRAWN)
    for taken in (1, 7, 19):
        rest = scrimp.generate(
            model,
            prompt(600, 3) + first.tokens[:taken],
            max_new_tokens=20 - taken,
            prefill="rows",
            **DRAWN,
        )
        assert rest.tokens == first.tokens[taken:]


def test_what_is_kept_is_not_read_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder_model(tiny("llama"))
    spans: list[tuple[int, int]] = []
    advance = forward.advance

    def watched(cache: KVCache, b: int, tokens: Tensor, first: int, *rest: object, **more: object) -> Tensor:
        spans.append((first, first + tokens.shape[1]))
        return advance(cache, b, tokens, first, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "advance", watched)
    cache, text = KVCache(model, 1, 1200), prompt(1200, 8)
    twins = [text[:600], text[:550] + [1] * 30, text[:600], text[:100], [1, *text[:5]]]
    alone = [scrimp.generate(model, tokens, max_new_tokens=5) for tokens in twins]
    spans.clear()
    assert scrimp.generate(model, twins, max_new_tokens=5) == alone
    assert spans == [(0, 512), (512, 576), (576, 600), (550, 580), (599, 600), (0, 64), (64, 100), (0, 6)]

    def read(n: int, **settings: object) -> list[tuple[int, int]]:
        spans.clear()
        scrimp.generate(model, text[:n], max_new_tokens=1, cache=cache, **settings)
        return list(spans)

    assert read(600) == [(0, 512), (512, 576), (576, 600)]
    assert read(700) == [(600, 664), (664, 700)]
    assert read(700) == [(699, 700)]
    assert read(1030) == [(512, 1024), (1024, 1030)]  # read before as rows, now a panel
    assert read(1030, prefill="rows")[0] == (0, 64)
    assert read(1040, prefill="rows") == [(1030, 1040)]
    assert read(900, chunk=256) == [
        (0, 512),
        (512, 576),
        (576, 640),
        (640, 704),
        (704, 768),
        (768, 832),
        (832, 896),
        (896, 900),
    ]


def test_sparse_panels(tiny: Tiny) -> None:
    """Narrow budgets change the result, budgets that cover everything do not; chunks and batches never do."""
    model = decoder_model(tiny("llama"))
    wide = scrimp.HeadPatterns(torch.full((2, 6), 5000).int(), torch.zeros(2, 6).int())
    narrow = scrimp.HeadPatterns(torch.full((2, 6), 64).int(), torch.full((2, 6), 16).int())
    texts = [prompt(1600, 1), prompt(30, 2)]

    def state(patterns: scrimp.HeadPatterns | None, n: int = 1600) -> Tensor:
        cache = KVCache(model, 1, 1600)
        found = forward.prefill(cache, 0, texts[0][:n], panels=True, patterns=patterns)
        assert found is not None
        return found

    assert not forward.pays(wide, 0, 512, 1536)
    assert forward.pays(narrow, 0, 512, 1536)
    assert torch.equal(state(wide), state(None))
    assert (state(narrow) - state(None)).abs().max() > 1e-3
    alone = [scrimp.generate(model, text, patterns=narrow, **HOW) for text in texts]
    assert scrimp.generate(model, texts, patterns=narrow, chunk=300, **HOW) == alone
    cache = KVCache(model, 1, 1700)
    scrimp.generate(model, texts[0], cache=cache, **HOW)  # dense panels are no use for sparse ones
    assert scrimp.generate(model, texts[0], cache=cache, patterns=narrow, **HOW) == alone[0]
