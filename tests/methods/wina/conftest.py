"""A tiny model and its calibration."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import scrimp
from scrimp import Calibration, KVCache
from scrimp.methods.generation import DecoderModel, forward
from scrimp.methods.generation.loop import step

TEXT = torch.randint(1, 256, (3, 60), generator=torch.Generator().manual_seed(5))
SIZES = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
STOCK = ("Gemma", "Gemma2", "Gemma3", "Phi", "Phi3")  # families that only transformers' own generate runs


@cache
def _stock(family: str) -> Any:
    torch.manual_seed(1)
    config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    made = getattr(transformers, config)(**SIZES)
    return getattr(transformers, f"{family}ForCausalLM")(made).eval()


@pytest.fixture
def text() -> Tensor:
    return TEXT


@cache
def _calibrated(model: Any) -> Calibration:
    return scrimp.calibrate(model, TEXT, progress=False)


@pytest.fixture
def calibrated(tiny: Callable[[str], Any]) -> Callable[[str], tuple[Any, Calibration]]:
    """A fresh copy of the model of a family, and its calibration."""

    def make(family: str) -> tuple[Any, Calibration]:
        model = _stock(family) if family in STOCK else tiny(family)
        return copy.deepcopy(model), _calibrated(model)

    return make


@pytest.fixture
def same_in_one_call() -> Callable[[DecoderModel], None]:
    """Checks that decoded tokens have the same bits by `decoder_layers` and by the ops one by one."""

    def check(view: DecoderModel) -> None:
        caches = []
        assert view.packed(range(len(view.layers))) is not None
        for model in (view, replace(view, packing=False)):
            cache = KVCache(model, 2, 16)
            for b, tokens in enumerate(([3, 1, 4], [1, 5])):
                forward.prefill(cache, b, tokens, panels=False, patterns=None)
            caches.append(cache)
        for token in (9, 200, 26):
            state, expected = (step(cache, [token, token + 1]) for cache in caches)
            assert torch.equal(state, expected)
        one, other = (cache.memory for cache in caches)
        assert torch.equal(one[:, :, 0, :, :6], other[:, :, 0, :, :6])

    return check
