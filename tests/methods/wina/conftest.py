"""A tiny model and its calibration."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import scrimp
from scrimp import Calibration

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
