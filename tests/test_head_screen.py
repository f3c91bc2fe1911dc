"""HeadScreen: its packing, and that its intervals hold the logits."""

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp import HeadScreen
from scrimp.head_screen import LARGEST, LARGEST_BYTE, SHARE_ON_CPU, SHARE_ON_GPU, pack, unpack

EVERYWHERE = 1e9  # a share that lets a byte do in every group
SHARES = [SHARE_ON_GPU, SHARE_ON_CPU, EVERYWHERE]


@pytest.mark.parametrize(("V", "groups", "wide"), [(1, 1, 0), (16, 2, 2), (37, 3, 1), (0, 1, 1), (5, 0, 0)])
def test_packing_can_be_undone(V: int, groups: int, wide: int) -> None:
    q = torch.randint(-7, 8, (V, 64 * groups))
    q[:, : 64 * wide] = torch.randint(-127, 128, (V, 64 * wide))
    assert torch.equal(unpack(pack(q, wide), groups, wide)[:V], q.int())


def test_packing_by_hand() -> None:
    """Coordinates 0 and 2 of the first row share its first word, 1 and 3 its second."""
    q = torch.zeros(1, 64, dtype=torch.int64)
    q[0, :4] = torch.tensor([1, 2, 3, 4])
    assert pack(q, 1)[0, :4].tolist() == [129, 131, 130, 132]
    assert pack(q, 0)[0, :4].tolist() == [0xB9, 0x88, 0xCA, 0x88]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [0, 1, 3])
@pytest.mark.parametrize("basis", [False, True])
def test_intervals_hold_the_logits(share: float, dtype: torch.dtype, wide: int, basis: bool) -> None:
    """Also those of rows and states of very different sizes, and of states that the basis was not made for."""
    torch.manual_seed(1)
    weight = (torch.randn(300, 150) * torch.logspace(-8, 4, 300)[:, None]).to(dtype)
    weight[7] = 0
    typical = torch.randn(200, 150) * torch.logspace(0, -3, 150)
    screen = HeadScreen.build(weight, typical if basis else None, wide=wide)
    x = torch.cat([typical[:20], 1e6 * torch.randn(20, 150), 1e-12 * torch.eye(150)[:20]]).to(dtype)
    centre, half = screen.interval(x, share)
    logits = scrimp.ops.linear(x.float(), weight.float()).double()
    assert ((logits - centre).abs() <= half).all()


def wrong_by(screen: HeadScreen, weight: Tensor, x: Tensor, share: float) -> Tensor:
    """How much of its half width the logit of row i and state i is away from the centre; none leaves its interval."""
    centre, half = screen.interval(x, share)
    wrong = (x.double() @ weight.double().T - centre).abs() / half
    assert (wrong <= 1).all()
    return wrong.diagonal()


@pytest.mark.parametrize(("largest", "share"), [(LARGEST, SHARE_ON_GPU), (LARGEST_BYTE, EVERYWHERE)])
def test_states_that_are_rounded_against_a_row(largest: int, share: float) -> None:
    """Rows that are their integers; half a step for every coordinate but one, with the signs of a row."""
    weight = torch.randint(-127, 128, (50, 64)).float()
    weight[:, 0] = 127
    x = 0.499 * weight.sign()
    x[:, 0] = largest
    assert (wrong_by(HeadScreen.build(weight), weight, x, share) > 0.5).all()


@pytest.mark.parametrize("share", [SHARE_ON_GPU, SHARE_ON_CPU])
def test_states_along_the_error_of_a_row(share: float) -> None:
    weight = torch.randn(50, 64)
    screen = HeadScreen.build(weight)
    x = weight / screen.scales[:50, None] - unpack(screen.codes, 1, 1)[:50]
    assert (wrong_by(screen, weight, x, share) > 0.5).all()


def test_the_cpu_screens_with_that_interval() -> None:
    """It computes the rows that reach the last of the k logits, which is among the 2 k that it guesses."""
    spread = torch.logspace(0, -2, 256)
    weight, x = torch.randn(3000, 256), torch.randn(20, 256) * spread
    screen = HeadScreen.build(weight, torch.randn(1000, 256) * spread, wide=1)
    values, _, scored = scrimp.ops.exact_head(x, weight, screen, 8)

    def reaching(share: float, wider: float = 1) -> Tensor:
        centre, half = screen.interval(x, share)
        return (centre + wider * half >= values[:, -1:].double()).sum(1)

    near = 1e-4  # the kernel's sums are those of fp32
    assert (reaching(SHARE_ON_CPU, 1 - near) <= scored).all()
    assert (scored <= reaching(SHARE_ON_CPU, 1 + near)).all()
    assert (reaching(SHARE_ON_GPU) < scored).sum() > 5
    assert (reaching(EVERYWHERE) > scored).sum() > 5


def test_intervals_are_narrow() -> None:
    """8 bits: within a hundredth of what the lengths of row and state allow."""
    weight, x = torch.randn(500, 128), torch.randn(50, 128)
    half = HeadScreen.build(weight).interval(x)[1]
    assert (half <= 0.02 * weight.norm(dim=1) * x.norm(dim=1, keepdim=True)).all()


def test_a_basis_lets_few_bits_suffice() -> None:
    weight, x = torch.randn(500, 192), torch.randn(50, 192) * torch.logspace(0, -3, 192)
    plain = HeadScreen.build(weight, wide=1)
    made = HeadScreen.build(weight, torch.randn(400, 192) * torch.logspace(0, -3, 192), wide=1)
    assert made.interval(x)[1].median() < 0.5 * plain.interval(x)[1].median()
    assert made.codes.nbytes == plain.codes.nbytes == 32 * 16 * 64 * 2


def test_sizes_and_devices() -> None:
    screen = HeadScreen.build(torch.randn(33, 70))
    assert (screen.rows, screen.wide, screen.basis) == (33, 2, None)
    assert screen.nbytes == 3 * 16 * 128 + 4 * (48 + 2 + 2)
    assert screen.to(torch.device("meta")).codes.is_meta


BAD = {
    "rank": ((torch.zeros(3), None), {}, r"weight must be \[V, K\], got shape \[3\]"),
    "states": ((torch.zeros(3, 4), torch.zeros(5, 3)), {}, r"states has shape \[5, 3\], expected \[n, 4\]"),
    "weight not finite": ((torch.full((3, 4), torch.inf), None), {}, "weight has a value that is not finite"),
    "states not finite": ((torch.zeros(3, 4), torch.full((1, 4), torch.nan)), {}, "states has a value that is not"),
    "wide": ((torch.zeros(3, 4), None), {"wide": 2}, "wide=2 must be from 0 to 1, the groups of 4 inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, options, words = BAD[case]
    with pytest.raises(ValueError, match=f"HeadScreen: {words}"):
        HeadScreen.build(*args, **options)
