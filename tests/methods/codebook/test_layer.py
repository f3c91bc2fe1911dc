"""CodebookLayer: its gradients, what its codes learn from, hooks, dead codes, the start by k-means."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from scrimp.methods.codebook import LOSSES, CodebookLayer
from scrimp.ops import codebook_topk

GROUPS = {"one": (), "one of many": (1,), "three": (3,)}


def layer_of(
    groups: tuple[int, ...] = (), codes: int = 30, width: int = 6, k: int = 4, **options: object
) -> CodebookLayer:
    return CodebookLayer(torch.randn(*groups, codes, width), k, **options)  # type: ignore[arg-type]


def chosen_codes(layer: CodebookLayer) -> Tensor:
    """`[M, G, k, D]`, differentiable."""
    G, _ = layer.counts.shape
    books = layer.codebook.view(G, *layer.codebook.shape[-2:])
    return books[torch.arange(G)[:, None], layer.index.view(-1, G, layer.k).long()]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("euclidean", [True, False])
def test_is_the_op(groups: tuple[int, ...], mean: bool, euclidean: bool) -> None:
    layer = layer_of(groups, mean=mean, euclidean=euclidean)
    x = torch.randn(2, 5, layer.groups * 6)
    expected = codebook_topk(x, layer.codebook.detach(), 4, euclidean=euclidean, mean=mean)
    for out in (layer(x), layer.eval()(x)):
        assert torch.equal(out, expected[0])
        assert torch.equal(layer.index, expected[1])


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("mean", [True, False])
def test_gradients(groups: tuple[int, ...], mean: bool) -> None:
    """The codes get what autograd gives them through the gather; x gets the gradient as it is."""
    layer = layer_of(groups, mean=mean)
    x = torch.randn(50, layer.groups * 6, requires_grad=True)
    weight = torch.randn(50, layer.groups * 6)
    layer(x).backward(weight)
    assert torch.equal(x.grad, weight)
    codes = chosen_codes(layer)
    out = (codes.mean(2) if mean else codes.sum(2)).flatten(1)
    (expected,) = torch.autograd.grad(out, layer.codebook, weight)
    torch.testing.assert_close(layer.codebook.grad, expected)


def test_gradients_where_codes_are_missing() -> None:
    """Rows without a score give nothing to the codes; of too few codes each has its share."""
    layer = layer_of(codes=5)
    layer.disable([0, 1, 2])
    x = torch.randn(3, 6)
    x[1, 2] = torch.nan
    layer(x).backward(torch.ones(3, 6))
    expected = torch.zeros(5, 6)
    expected[3:] = 2 / 2
    torch.testing.assert_close(layer.codebook.grad, expected)


def test_losses() -> None:
    x, weight = torch.randn(40, 6), torch.randn(40, 6)
    found = {}
    for learn in LOSSES:
        torch.manual_seed(3)
        layer, own = layer_of(learn=learn, commitment=0.5), x.clone().requires_grad_()
        out = layer(own)
        mean = chosen_codes(layer).mean(2).flatten(1)
        (out * weight).sum().backward(retain_graph=True)
        task = None if layer.codebook.grad is None else layer.codebook.grad.clone()
        error = (mean - x).square().mean()
        if learn == "task":
            assert layer.loss is None
            assert task is not None
            assert torch.equal(own.grad, weight)
        else:
            assert task is None
            torch.testing.assert_close(layer.loss, error * (1.5 if learn == "commitment" else 1.0))
            layer.loss.backward()
            torch.testing.assert_close(layer.codebook.grad, torch.autograd.grad(error, layer.codebook)[0])
            pull = 0.5 * 2 * (x - mean.detach()) / x.numel() if learn == "commitment" else 0.0
            torch.testing.assert_close(own.grad, weight + pull)
        found[learn] = out.detach()
    assert torch.equal(found["task"], found["reconstruction"])


@pytest.mark.parametrize("learn", ["task", "reconstruction"])
def test_codes_learn_from_scratch(learn: str) -> None:
    """Random codes come to stand for rows that lie around eight points; dead codes are replaced on the way."""
    points = 3 * torch.randn(8, 6)
    layer = layer_of(codes=16, k=1, euclidean=True, learn=learn)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)

    def step(count: int) -> float:
        x = points[torch.randint(8, (count,))] + 0.05 * torch.randn(count, 6)
        error = (layer(x) - x).square().mean()
        loss = error if layer.loss is None else layer.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(error.detach())

    first = step(64)
    for i in range(150):
        step(64)
        if i % 50 == 9:
            layer.replace_dead()
    assert step(64) < 0.05 < 1 < first


def test_dead_codes_are_replaced_by_rows() -> None:
    layer = layer_of((2,), codes=20, k=3)
    with pytest.raises(ValueError, match="replace_dead needs rows"):
        layer.replace_dead()
    x = torch.randn(4, 12)
    layer.eval()(x)
    assert not layer.counts.any()
    layer.train()(x)
    layer(x)
    expected = torch.stack([torch.bincount(layer.index[:, g].flatten(), minlength=20) for g in range(2)])
    assert torch.equal(layer.counts, 2 * expected)
    before, dead = layer.codebook.detach().clone(), layer.counts == 0
    assert layer.replace_dead() == int(dead.sum()) > 0
    assert torch.equal(layer.codebook[~dead], before[~dead])
    for g in range(2):
        own = x[:, 6 * g : 6 * g + 6]
        assert all((own == row).all(-1).any() for row in layer.codebook[g][dead[g]])
    assert not layer.counts.any()
    layer(x)
    assert layer.replace_dead(least=10**6) == 40


@pytest.mark.parametrize("group", [0, 2])
def test_disabled_and_forced_codes(group: int) -> None:
    layer, x = layer_of((3,)).eval(), torch.randn(20, 18)
    layer(x)
    before = layer.index.clone()
    taken = [int(code) for code in before[:, group, 0].unique()]
    layer.disable(taken, group)
    layer(x)
    assert not torch.isin(layer.index[:, group], torch.tensor(taken)).any()
    others = [g for g in range(3) if g != group]
    assert torch.equal(layer.index[:, others], before[:, others])
    layer.force(7, group)
    out = layer(x)
    assert (layer.index[:, group, 0] == 7).all()
    torch.testing.assert_close(out, chosen_codes(layer).mean(2).flatten(1).detach())
    layer.release()
    layer(x)
    assert torch.equal(layer.index, before)
    layer.force([1, 2, 3], group)
    with pytest.raises(ValueError, match=rf"5 codes of group {group} would be forced, but a row has k=4"):
        layer.force([4, 5], group)
    layer(x)
    assert (layer.index[:, group, :3] == torch.tensor([1, 2, 3])).all()


def test_hooks_live_through_a_change_of_dtype() -> None:
    layer = layer_of()
    layer.disable(3)
    layer.to(torch.bfloat16)
    layer(torch.randn(50, 6).bfloat16())
    assert not (layer.index == 3).any()


@pytest.mark.parametrize("groups", [0, 2])
def test_start_by_k_means(groups: int) -> None:
    """The centroids of rows that lie around five points are the points, in each group."""
    points = 5 * torch.randn(5, 8)
    rows = points[torch.arange(200) % 5] + 0.01 * torch.randn(200, 8)
    layer = CodebookLayer.from_rows(rows, 40, 1, groups=groups, iterations=20, seed=1, euclidean=True).eval()
    assert layer.codebook.shape == ((2, 40, 4) if groups else (40, 8))
    assert float((layer(rows) - rows).square().mean().detach()) < 1e-4
    again = CodebookLayer.from_rows(rows, 40, 1, groups=groups, iterations=20, seed=1)
    assert torch.equal(layer.codebook, again.codebook)


def test_copies_and_files() -> None:
    """After training calls, whose losses no copy can hold."""
    layer = layer_of(learn="commitment")
    layer(torch.randn(3, 6, requires_grad=True))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.codebook, layer.codebook)
        assert copied.loss is None
    assert set(layer.state_dict()) == {"codebook"}


BOOK = torch.zeros(5, 4)
BAD = {
    "rank": (lambda: CodebookLayer(BOOK[0]), r"codebook must be floats \[C, D\] or \[G, C, D\], got float32 \[4\]"),
    "integers": (lambda: CodebookLayer(BOOK.int()), r"got int32 \[5, 4\]"),
    "NaN": (lambda: CodebookLayer(BOOK + torch.nan), "codebook has values that are not finite"),
    "k": (lambda: CodebookLayer(BOOK, 6), "k=6 must be from 1 to the 5 codes"),
    "no codes": (lambda: CodebookLayer(BOOK[:0], 1), "k=1 must be from 1 to the 0 codes"),
    "learn": (lambda: CodebookLayer(BOOK, 2, learn="more"), "learn='more' must be one of task, reconstruction"),
    "commitment": (lambda: CodebookLayer(BOOK, 2, commitment=-1.0), "commitment=-1.0 must not be negative"),
    "width of x": (lambda: CodebookLayer(BOOK, 2)(torch.zeros(3, 5)), r"x has shape \[3, 5\]"),
    "group": (lambda: CodebookLayer(BOOK, 2).disable(1, 1), "group=1 is not one of the 1 groups"),
    "code": (lambda: CodebookLayer(BOOK, 2).force([0, 5]), "code 5 is not one of the 5 codes"),
    "negative code": (lambda: CodebookLayer(BOOK, 2).disable(-1), "code -1 is not one of the 5 codes"),
    "rank of rows": (
        lambda: CodebookLayer.from_rows(BOOK[0], 1, 1),
        r"rows must be floats \[N, D\], got float32 \[4\]",
    ),
    "rows": (lambda: CodebookLayer.from_rows(BOOK, 6, 1), "codes=6 must be from 1 to the 5 rows"),
    "groups": (lambda: CodebookLayer.from_rows(BOOK, 2, 1, groups=3), "groups=3 must divide rows of 4 numbers"),
    "NaN rows": (lambda: CodebookLayer.from_rows(BOOK / 0, 2, 1), "rows has values that are not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
