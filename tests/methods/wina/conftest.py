"""A tiny model and its calibration."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp import Calibration

TEXT = torch.randint(1, 256, (3, 60), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def text() -> Tensor:
    return TEXT


@cache
def _calibrated(model: Any) -> Calibration:
    return scrimp.calibrate(model, TEXT, progress=False)


@pytest.fixture
def calibrated(tiny: Callable[[str], Any]) -> Callable[[str], tuple[Any, Calibration]]:
    """A fresh copy of the model of a family, and its calibration."""
    return lambda family: (copy.deepcopy(tiny(family)), _calibrated(tiny(family)))
