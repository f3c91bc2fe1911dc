"""Bad tensors and bad calls: one per check, by its words."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plan_cases import check_counts

from scrimp.sparse_plan import SparsePlan


def tensors(**changes: Any) -> dict[str, Any]:
    """A good plan for 20 queries and keys in tiles of 8 (two heads), with changes."""
    ranges = [[[0, 4], [8, 12], [12, 20]], [[0, 2], [4, 6], [0, 0]]]
    good = {
        "ranges": torch.tensor([ranges], dtype=torch.int32),
        "range_slice": torch.tensor([[[[0, 1], [0, 2], [0, 3]], [[0, 1], [1, 1], [0, 2]]]], dtype=torch.int32),
        "columns": torch.tensor([[[5, 7, 19], [3, 7, 9]]], dtype=torch.int32),
        "column_slice": torch.tensor([[[[0, 0], [0, 2], [0, 3]], [[0, 1], [1, 2], [3, 0]]]], dtype=torch.int32),
        "n_q": 20,
        "q_block": 8,
    }
    return good | changes


def changed(name: str, at: tuple[int, ...], *values: int) -> dict[str, Any]:
    tensor = tensors()[name].clone()
    tensor[at] = torch.tensor(values if len(values) > 1 else values[0], dtype=torch.int32)
    return {name: tensor}


def test_from_tensors() -> None:
    plan = SparsePlan.from_tensors(**tensors())
    assert plan.to_mask()[0, 1, 19].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert plan.to_mask()[0, 0, 15].nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 7, 8, 9, 10, 11]
    check_counts(plan)
    unused = changed("ranges", (0, 1, 2), 99, -99)
    assert SparsePlan.from_tensors(**tensors(**unused)).same_pairs(plan)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        changed("ranges", (0, 0, 1), 12, 8),
        ValueError,
        r"ranges\[0, 0\] tile 1: range \[12, 8\) is empty or reversed",
    ),
    (
        changed("ranges", (0, 1, 1), 6, 6),
        ValueError,
        r"ranges\[0, 1\] tile 1: range \[6, 6\) is empty",
    ),
    (
        changed("ranges", (0, 0, 2), 12, 21),
        ValueError,
        r"tile 2: range \[12, 21\) is not inside \[0, n_k=20\)",
    ),
    (
        changed("ranges", (0, 1, 0), -1, 2),
        ValueError,
        r"ranges\[0, 1\] tile 0: range \[-1, 2\) is not inside",
    ),
    (
        changed("ranges", (0, 0, 1), 3, 12),
        ValueError,
        r"tile 1: range \[0, 4\) is followed by \[3, 12\): .*disjoint",
    ),
    (
        changed("ranges", (0, 0, 0), 15, 16),
        ValueError,
        r"range \[15, 16\) is followed by \[8, 12\): .*sorted",
    ),
    (
        changed("columns", (0, 0, 1), 20),
        ValueError,
        r"columns\[0, 0\] tile 1: column 20 is not inside",
    ),
    (
        changed("columns", (0, 1, 0), -4),
        ValueError,
        r"columns\[0, 1\] tile 0: column -4 is not inside",
    ),
    (
        changed("columns", (0, 1, 2), 7),
        ValueError,
        r"tile 1: column 7 is followed by 7: .*strictly increasing",
    ),
    (
        changed("range_slice", (0, 1, 2), 2, 2),
        ValueError,
        r"range_slice\[0, 1\] tile 2: \(first=2, count=2\) .* 3 ent",
    ),
    (
        changed("range_slice", (0, 0, 0), 0, -1),
        ValueError,
        r"range_slice\[0, 0\] tile 0: \(first=0, count=-1\)",
    ),
    (
        changed("column_slice", (0, 0, 1), -1, 1),
        ValueError,
        r"column_slice\[0, 0\] tile 1: \(first=-1, count=1\)",
    ),
    (
        changed("column_slice", (0, 0, 1), 2**31 - 1, 2),
        ValueError,
        r"tile 1: \(first=2147483647, count=2\)",
    ),
    (
        {"n_q": 30},
        ValueError,
        r"range_slice has shape \[1, 2, 3, 2\], expected \[B, H, 4, 2\] for n_q=30",
    ),
    ({"n_k": 19}, ValueError, r"range \[12, 20\) is not inside \[0, n_k=19\)"),
    (
        {"columns": tensors()["columns"][:, :1]},
        ValueError,
        r"columns has shape \[1, 1, 3\], .* B=1, H=2",
    ),
    (
        {"columns": tensors()["columns"][0]},
        ValueError,
        r"columns has shape \[2, 3\], expected \[B, H, C\]",
    ),
    (
        {"ranges": tensors()["columns"]},
        ValueError,
        r"ranges has shape \[1, 2, 3\], expected \[B, H, R, 2\]",
    ),
    ({"ranges": tensors()["ranges"].long()}, TypeError, r"ranges must be int32, got torch.int64"),
    ({"columns": [1, 2]}, TypeError, r"columns must be an int32 tensor, got list"),
    (
        {"columns": tensors()["columns"].to("meta")},
        ValueError,
        r"columns is on meta, ranges on cpu",
    ),
    ({"row_start": torch.zeros(1, 20)}, TypeError, r"row_start must be None or an int32 tensor, got torch.float32"),
    ({"row_start": [0] * 20}, TypeError, r"row_start must be None or an int32 tensor, got list"),
    (
        {"row_start": torch.zeros(20, dtype=torch.int32)},
        ValueError,
        r"row_start has shape \[20\], expected \[1, n_q=20\]",
    ),
    (
        {"row_start": torch.zeros(2, 20, dtype=torch.int32)},
        ValueError,
        r"row_start has shape \[2, 20\], expected \[1, n_q=20\]",
    ),
    ({"row_start": torch.zeros(1, 19, dtype=torch.int32)}, ValueError, r"row_start has shape \[1, 19\]"),
    (
        {"row_start": torch.zeros(1, 20, dtype=torch.int32, device="meta")},
        ValueError,
        r"row_start is on meta, ranges on cpu",
    ),
    (
        {"row_start": torch.arange(20, dtype=torch.int32)[None] - 1},
        ValueError,
        r"row_start\[0, 0\]=-1 is not inside \[0, n_k=20\]",
    ),
    (
        {"row_start": torch.arange(20, dtype=torch.int32)[None] + 2},
        ValueError,
        r"row_start\[0, 19\]=21 is not inside \[0, n_k=20\]",
    ),
    ({"q_block": 0}, ValueError, r"q_block=0 is outside \[1, 2147483647\]"),
    ({"n_q": 20.0}, TypeError, r"n_q=20.0 must be an int, got float"),
    ({"n_q": -1}, ValueError, r"n_q=-1 is outside"),
    ({"q_offset": 2**40}, ValueError, r"q_offset=1099511627776 is outside"),
    ({"causal": 1}, TypeError, r"causal=1 must be a bool"),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_tensors(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="^SparsePlan: .*" + text):
        SparsePlan.from_tensors(**tensors(**changes))


def test_validate_checks_a_plan_made_by_hand() -> None:
    plan = SparsePlan.dense(20, q_block=8)
    with pytest.raises(TypeError, match="q_block=True must be an int"):
        dataclasses.replace(plan, q_block=True).validate()
    with pytest.raises(TypeError, match="causal=None"):
        dataclasses.replace(plan, causal=None).validate()  # type: ignore[arg-type]
    assert plan.validate() is plan


BAD_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SparsePlan.dense(-3), ValueError, r"n_q=-3 is outside"),
    (lambda: SparsePlan.dense(3, 2**31), ValueError, r"n_k=2147483648 is outside"),
    (lambda: SparsePlan.a_shape(8, "4", 2), TypeError, r"sink\[0\]='4'|sink='4' must be an int"),
    (lambda: SparsePlan.a_shape(8, [1, -2], 2), ValueError, r"sink\[1\]=-2 is outside"),
    (
        lambda: SparsePlan.a_shape(8, [1, 2, 3], [1, 2]),
        ValueError,
        r"heads differ: sink for 3, window for 2",
    ),
    (lambda: SparsePlan.sliding_window(8, [1]), TypeError, r"window=\[1\] must be an int, got list"),  # type: ignore[arg-type]
    (lambda: SparsePlan.sliding_window(8, -1), ValueError, r"window=-1 is outside"),
    (lambda: SparsePlan.from_documents([8], q_block=0, causal=False), ValueError, r"q_block=0 is outside"),
    (
        lambda: SparsePlan.vertical_slash(8, [8]),
        ValueError,
        r"columns\[0, 0\]: 8 is outside \[0, 8\)",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [[1], [-1]]),
        ValueError,
        r"columns\[0, 1\]: -1 is outside",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [0], [8]),
        ValueError,
        r"diagonals\[0, 0\]: 8 is outside \[0, 8\)",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=[(-1, 2)]),
        ValueError,
        r"bands \(start\)\[0, 0\]: -1 is outside",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=[(1, 0)]),
        ValueError,
        r"bands \(width\)\[0, 0\]: 0 is outside",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [1.5]),
        TypeError,
        r"columns must hold ints, got torch.float32",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [1, [2]]),
        TypeError,
        r"columns=\[1, \[2\]\] is not a list of ints",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, 3),
        ValueError,
        r"columns has shape \[\], expected \[K\], \[H, K\]",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=torch.ones(3, 4)),
        TypeError,
        r"bands must hold ints",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=torch.ones(3, 4).long()),
        ValueError,
        r"bands has shape \[3, 4\]",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [[1], [2]], [[0]] * 3),
        ValueError,
        r"columns for 2, diagonals for 3",
    ),
    (
        lambda: SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2)),
        TypeError,
        r"must be bool .*got torch.float32",
    ),
    (
        lambda: SparsePlan.from_block_mask(torch.ones(2, 2).bool()),
        ValueError,
        r"has shape \[2, 2\]",
    ),
    (
        lambda: SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2).bool(), n_q=300),
        ValueError,
        r"n_q=300 .* \[5, 2\]",
    ),
    (lambda: SparsePlan.from_mask([[True]]), TypeError, r"mask must be bool .*got list"),  # type: ignore[arg-type]
    (
        lambda: SparsePlan.from_bsr(torch.tensor([0, 3]), torch.tensor([0, 1]), n_k=128),
        ValueError,
        r"at most 2 .*\[0, 3\]",
    ),
    (
        lambda: SparsePlan.from_bsr(torch.tensor([0, 1]), torch.tensor([2]), n_k=128),
        ValueError,
        r"column 2 is outside \[0, 2\)",
    ),
    (
        lambda: SparsePlan.from_bsr(torch.ones(2), torch.tensor([2]), n_k=128),
        TypeError,
        r"crow_indices must be an int tensor",
    ),
    (
        lambda: SparsePlan.from_bsr(torch.tensor(1), torch.tensor([2]), n_k=128),
        ValueError,
        r"crow_indices has shape \[\]",
    ),
    (lambda: SparsePlan.from_documents(ids=torch.ones(4)), TypeError, r"ids must be an int tensor, got torch.float32"),
    (lambda: SparsePlan.from_minference(*[torch.ones(1, 1, 1)] * 4, n=64), TypeError, r"block_count must be an int"),
    (lambda: SparsePlan.dense(64).to_bsr(0), ValueError, r"k_block=0 is outside"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS, ids=[text for _, _, text in BAD_CALLS])
def test_bad_calls(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="^SparsePlan: .*" + text):
        call()


def test_bad_padding() -> None:
    with pytest.raises(ValueError, match=r"starts\[1\]=9 is outside \[0, 8\]"):
        SparsePlan.dense(8).with_padding([0, 9])
    with pytest.raises(ValueError, match=r"3 starts .* plan of 2 sequences|expand batch from 2 to 3"):
        SparsePlan.dense(8).expand(batch=2).with_padding([0, 1, 2])
