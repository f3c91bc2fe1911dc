"""channel_select in CUDA C++: a row's bits among any rows, wide rows, far rows, and the calls it takes."""

import mmap

import pytest
import torch
from cuda_device import call
from cuda_subjects.channel_select import BAD, CASES, COMMON
from subjects.channel_select import check, make

from scrimp.ops.channel_select import CUDA_CHANNELS, RULES, _cuda_takes


@pytest.mark.parametrize("rule", RULES)
def test_a_row_has_the_same_bits_among_any_rows(rule: str) -> None:
    """kept and energy; also beside wild rows."""
    x, level, scale, center, whole, *rest = make(6, 328, torch.bfloat16, rule, False, True, "random", False)
    kept, _, _, energy = call("channel_select", x, level, scale, center, whole, *rest)[0]
    for rows in (1, 4):
        results = call("channel_select", x[:rows], level, scale, center, whole[:rows], *rest)[0]
        assert torch.equal(results[0], kept[:rows])
        assert torch.equal(results[3], energy[:rows])
    x[::2] = torch.nan
    results = call("channel_select", x, level, scale, center, whole, *rest)[0]
    assert torch.equal(results[0][1::2], kept[1::2])
    assert torch.equal(results[3][1::2], energy[1::2])


@pytest.mark.parametrize("rule", ["top_k", "top_p"])
def test_wide_rows(rule: str) -> None:
    """As many channels as shared memory holds; shares differ from the reference's in sums of doubles alone."""
    args = make(1, CUDA_CHANNELS, torch.float16, rule, False, False, "ties", False)
    check(call("channel_select", *args)[0], args)


def test_scores_of_every_size() -> None:
    """Denormal numbers, and such whose squares fp32 has not; the share of one infinite score is its own."""
    x = torch.tensor([[1e-40, 3e38, -2e38, 1e-20, 0.0, 1e38, 2e-40, 1.0]])
    for level in (0.5, 0.9, 0.99, 1.0):
        args = (x, torch.tensor([level]), None, None, None, RULES.index("top_p"), False)
        kept, index, count, _ = call("channel_select", *args)[0]
        assert torch.equal(kept != 0, expected(x[0], level)[None]), level
        assert index[: int(count)].tolist() == expected(x[0], level).nonzero().flatten().tolist()
    tiny = torch.tensor([[1e-40, 3e-40, -2e-40]])
    kept = call("channel_select", tiny, torch.tensor([0.9]), None, None, None, 3, False)[0][0]
    assert torch.equal(kept != 0, torch.tensor([[False, True, True]]))
    x[0, 3] = torch.inf
    kept = call("channel_select", x, torch.tensor([0.9]), None, None, None, 3, False)[0][0]
    assert kept[0].isinf().tolist() == (kept[0] != 0).tolist()


def expected(x: torch.Tensor, level: float) -> torch.Tensor:
    """By doubles, the largest first."""
    energy = x.double().square()
    order = energy.argsort(descending=True)
    before = (energy[order].cumsum(0) - energy[order]) / energy.sum()
    kept = torch.zeros(len(x), dtype=torch.bool)
    kept[order] = before < torch.tensor(level).double() if level < 1 else energy[order] > 0
    return kept


def test_rows_beyond_32_bit_offsets() -> None:
    """Two rows of x 2^31 + 64 elements apart, in memory that is only reserved."""
    apart = 2**31 + 64
    memory = mmap.mmap(-1, 2 * apart + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((2, 64), (apart, 1))
    x, *rest = make(2, 64, torch.float16, "top_k", True, False, "random", False)
    far.copy_(x)
    check(call("channel_select", far, *rest)[0], (x, *rest))


def test_calls_that_it_takes() -> None:
    assert all(_cuda_takes(*make_case()) for make_case in CASES.values())
    args = CASES[COMMON]()
    for name, (change, _) in BAD.items():
        assert _cuda_takes(*change(args)) == (name not in {"dtype", "channels"}), name
