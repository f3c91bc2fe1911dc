"""A row has the bits of its own list, whatever stands beside it: for linears that read listed inputs alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[slice, Tensor, Tensor], Tensor]
ALONE = (3, 40)  # rows that run by themselves


def own_lists(rows: int, inputs: int) -> Tensor:
    """Which inputs each row lists, bool `[rows, inputs]`: three of ten."""
    return torch.rand(rows, inputs) < 0.3


def listing(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Index and count of the inputs that a bool `[inputs]` lists."""
    index = listed.nonzero().flatten().int()
    return index, torch.tensor([len(index)], dtype=torch.int32)


def assert_company_changes_nothing(run: Run, x: Tensor, own: Tensor, counts: Sequence[int]) -> None:
    """Rows have the same bits all together, as the first few of them, alone and beside rows of NaN.

    Args:
        run: rows (a slice), their x and a list (bool `[inputs]`) -> the result of those rows.
        x: `[rows, inputs]`, 0 where a row's own list has no input.
        own: bool `[rows, inputs]`.
        counts: numbers of rows, on both sides of every change of tile.
    """
    everything = torch.ones_like(own[0])
    whole = run(slice(len(x)), x, everything)
    assert bool(whole.isfinite().all()), "not finite"
    assert not torch.equal(whole[0], whole[1]), "two rows are equal"
    for count in counts:
        some = slice(count)
        assert torch.equal(run(some, x[some], own[some].any(0)), whole[some]), f"{count} rows"
    for row in ALONE:
        one = slice(row, row + 1)
        assert torch.equal(run(one, x[one], own[row]), whole[one]), f"row {row} alone"
    some = slice(9)
    wild = x[some].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(some, wild, everything)[1::2], whole[1:9:2]), "beside NaN"
