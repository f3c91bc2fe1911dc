"""Bitwise comparison, and the test that a row of a result depends on nothing but its own inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ROWS = 64  # up to here the bits of a row do not depend on the number of rows
POISON = (torch.nan, torch.inf, -torch.inf, 1e30)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to the bit: NaN equals NaN, and 0 is not -0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
    )


def assert_rows_independent(call: Callable[..., Tensor], *rows: Tensor) -> None:
    """Asserts that a row has the same bits alone, among any number of others, beside poison and on two threads.

    Args:
        call: takes tensors of M rows each and returns M rows, whatever M.
        rows: the arguments, `[64, ...]` each.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([call(*(x[m : m + 1] for x in rows)) for m in range(MAX_ROWS)])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in range(1, MAX_ROWS + 1):
                first = (7 * count) % (MAX_ROWS - count + 1)
                some = slice(first, first + count)
                if not same_bits(call(*(x[some] for x in rows)), alone[some]):
                    raise AssertionError(f"{count} rows from {first} on, {threads} threads: not the bits of one row")
            for start, poison in enumerate(POISON):
                spoiled = [x.clone() for x in rows]
                for x in spoiled:
                    x[torch.arange(MAX_ROWS) % len(POISON) != start] = poison
                if not same_bits(call(*spoiled)[start :: len(POISON)], alone[start :: len(POISON)]):
                    raise AssertionError(f"rows beside {poison}, {threads} threads: not the bits of one row")
    finally:
        torch.set_num_threads(before)
