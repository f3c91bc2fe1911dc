"""The assertion about a row's company sees each way in which company can change a row."""

from collections.abc import Callable

import pytest
import torch
from companies import assert_company_changes_nothing, own_lists
from torch import Tensor

K, COUNTS = 24, (1, 5)


def sound(rows: slice, x: Tensor, listed: Tensor) -> Tensor:
    """Sums of small integers, which are exact."""
    return x[:, listed].sum(1, keepdim=True)


FAULTS: dict[str, tuple[Callable[[slice, Tensor, Tensor], Tensor], str]] = {
    "number of rows": (lambda rows, x, listed: sound(rows, x, listed) + (len(x) == 5), "5 rows"),
    "list": (lambda rows, x, listed: sound(rows, x, listed) + listed.sum(), "rows"),
    "place": (lambda rows, x, listed: sound(rows, x, listed) + (rows.start == 3), "row 3 alone"),
    "neighbour": (lambda rows, x, listed: sound(rows, x, listed) + 0 * x.sum(), "beside NaN"),
    "always the same": (lambda rows, x, listed: torch.zeros(len(x), 1), "two rows are equal"),
    "no numbers": (lambda rows, x, listed: sound(rows, x, listed) + torch.nan, "not finite"),
}


def test_a_sound_run_passes() -> None:
    own = own_lists(64, K)
    assert_company_changes_nothing(sound, torch.randint(1, 100, (64, K)).float().masked_fill(~own, 0), own, COUNTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str) -> None:
    run, words = FAULTS[fault]
    own = own_lists(64, K)
    x = torch.randint(1, 100, (64, K)).float().masked_fill(~own, 0)
    with pytest.raises(AssertionError, match=words):
        assert_company_changes_nothing(run, x, own, COUNTS)
