"""tree_attention against its reference, plain decoding and its contract."""

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["tree_attention"]
IMPLEMENTATIONS = scrimp.implementations("tree_attention")
NAMES = ("out", "lse")
# B, H, G, T, D, prefix
SHAPES = [
    (1, 1, 1, 1, 1, [0]),
    (2, 6, 2, 5, 40, [70, 3]),
    (1, 9, 3, 64, 64, [600]),
    (3, 4, 1, 17, 19, [63, 64, 65]),
    (1, 8, 1, 1, 128, [1100]),
    (1, 2, 2, 33, 256, [500]),
]


def random_tree(T: int) -> tuple[list[int], list[int]]:
    """Parents (-1 for a root) and ancestor words, signed as int64."""
    parents, words = [], []
    for t in range(T):
        parent = int(torch.randint(-1, t, (1,))) if t else -1
        parents.append(parent)
        words.append((words[parent] if parent >= 0 else 0) | 1 << t)
    return parents, [word - (1 << 64) if word >> 63 else word for word in words]


def inputs(
    B: int, H: int, G: int, T: int, D: int, prefix: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C = max(prefix) + T + 3
    q, k, v = (torch.randn(B, heads, n, D).to(dtype) for heads, n in ((H, T), (G, C), (G, C)))
    return q, k, v, torch.tensor(prefix, dtype=torch.int32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", ["chain", "tree", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: torch.dtype, mask: str, shape: tuple[int, ...]) -> None:
    q, k, v, prefix = inputs(*shape, dtype)  # type: ignore[arg-type]
    words = torch.tensor([random_tree(q.shape[2])[1]]) if mask == "tree" else None
    args = (q, k, v, prefix, words, 50 if mask == "window" else 0, q.shape[3] ** -0.5)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


def test_reference_is_softmax_attention() -> None:
    q, k, v, prefix = inputs(1, 4, 2, 5, 16, [9])
    out, lse = OP.reference(q, k, v, prefix, None, 0, 0.3)
    mask = torch.ones(5, 14, dtype=torch.bool).tril(9)
    k, v = k[:, :, :14].repeat_interleave(2, 1), v[:, :, :14].repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, (0.3 * q @ k.mT).masked_fill(~mask, -torch.inf).logsumexp(3))


def test_reference_of_a_tree_is_the_chain_of_its_path() -> None:
    q, k, v, prefix = inputs(1, 2, 1, 6, 8, [4])
    parents, words = random_tree(6)
    out, lse = OP.reference(q, k, v, prefix, torch.tensor([words]), 0, 1.0)
    for t in range(6):
        slots, node = list(range(4)), t
        path = []
        while node >= 0:
            path.append(4 + node)
            node = parents[node]
        keys = slots + path[::-1]
        scores = q[:, :, t : t + 1] @ k[:, :, keys].mT
        torch.testing.assert_close(out[:, :, t], (scores.softmax(-1) @ v[:, :, keys])[:, :, 0])
        torch.testing.assert_close(lse[:, :, t], scores.logsumexp(-1)[..., 0])
