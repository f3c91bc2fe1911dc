"""Int4Channels: the weight turned, and turned back."""

import pytest
import torch

from scrimp import Int4Weight
from scrimp.int4_weight import Int4Channels
from scrimp.testing import random_int4_weight
from scrimp.testing.int4 import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 32, 16), (128, 64, 32), (333, 100, 100), (0, 32, 32), (3, 0, 32)]
)
def test_there_and_back(n: int, k: int, group_size: int, kind: str) -> None:
    weight = random_int4_weight(n, k, group_size, kind, permuted=True)
    turned = Int4Channels.of(weight)
    assert (turned.out_features, turned.columns, turned.in_features) == (n, k, k)
    assert turned.codes.shape == (k, 64 * -(-n // 128))
    back = turned.weight()
    for name, tensor in weight.tensors().items():
        other = back.tensors()[name]
        assert (tensor is None) == (other is None)
        assert tensor is None or torch.equal(tensor, other)  # type: ignore[arg-type]
    assert (back.group_size, back.zero_kind, back.in_features) == (group_size, weight.zero_kind, k)


def test_nibbles_lie_where_the_docstring_says() -> None:
    codes = torch.randint(0, 16, (200, 16), dtype=torch.uint8)
    turned = Int4Channels.of(Int4Weight.from_codes(codes, torch.ones(200, 1))).codes
    for output in (0, 1, 4, 15, 16, 31, 32, 127, 128, 199):
        tile, within = divmod(output, 128)
        r, h, a, i = within // 32, within // 16 % 2, within // 4 % 4, within % 4
        assert torch.equal(turned[:, 64 * tile + 16 * a + 4 * r + i] >> 4 * h & 15, codes[output])
    assert int((turned[:, 64:].view(16, 4, 4, 4)[:, :, 3]).count_nonzero()) == 0  # outputs behind the last


def test_an_odd_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Int4Channels: codes has shape \[32, 60\], expected \[32, 64\]"):
        Int4Channels(torch.zeros(32, 60, dtype=torch.uint8), torch.ones(1, 70), group_size=32)
