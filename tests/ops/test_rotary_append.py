"""rotary_append against its reference, Hugging Face's rotation and its contract."""

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["rotary_append"]
IMPLEMENTATIONS = scrimp.implementations("rotary_append")
NAMES = ("q", "k_cache", "v_cache")
# B, T, H, G, D, R
SHAPES = [(1, 1, 1, 1, 2, 2), (2, 5, 6, 2, 64, 64), (1, 64, 3, 3, 40, 20), (3, 2, 4, 1, 19, 6), (1, 3, 2, 1, 8, 0)]


def inputs(B: int, T: int, H: int, G: int, D: int, R: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, v = torch.randn(B, T, H + 2 * G, D).to(dtype).split((H, G, G), 2)
    angle = 6 * torch.rand(100, R)
    positions = torch.randint(100, (B, T), dtype=torch.int32)
    start = torch.randint(7, (B,), dtype=torch.int32)
    caches = [torch.randn(B, G, T + 6, D).to(dtype) for _ in range(2)]
    return [q, k, v, angle.cos(), angle.sin(), positions, start, *caches]


def on_copies(call: object) -> object:
    """The op on copies of the caches, which it returns too."""

    def run(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        caches = [cache.clone() for cache in args[7:]]
        return call(*args[:7], *caches), *caches  # type: ignore[operator]

    return run


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = inputs(*shape, dtype)
    got = on_copies(IMPLEMENTATIONS[name])(*args)
    assert_matches_oracle(got, on_copies(OP.reference), *args, names=NAMES)


def test_reference_is_hugging_faces() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v, cos, sin, positions, start, k_cache, v_cache = inputs(1, 5, 4, 2, 16, 16)
    got = OP.reference(q, k, v, cos, sin, positions, start, k_cache, v_cache)
    rows = positions.long()
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos[rows], sin[rows])
    assert torch.equal(got, expected[0])
    first = int(start)
    assert torch.equal(k_cache[:, :, first : first + 5], expected[1])
    assert torch.equal(v_cache[:, :, first : first + 5], v.transpose(1, 2))
