"""Many calls and many threads: memory stays flat, tokens stay the same (`benchmarks/soak.py` runs the full numbers)."""

import pytest
from scrimp.benchmarks import soak

from scrimp.methods.generation import DecoderModel


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return soak.tiny_model()


def test_memory_stays_flat(model: DecoderModel) -> None:
    assert soak.growth(model, calls=150, warm_up=100) < 4 * 2**20


def test_eight_threads_give_the_tokens_of_one(model: DecoderModel) -> None:
    assert soak.threads_agree(model, calls=24, threads=8)
