"""Rows of compiled kernels have the same bits alone, in company, and wherever they lie in memory."""

import pytest
import torch
from emulate import compile_launches, execute
from scrimp.kernels import codebook_topk, linear, rms_norm
from torch import Tensor


def normed(x: Tensor, weight: Tensor) -> Tensor:
    out, launches = rms_norm.launches(x, weight, 1e-5)
    execute(launches)
    return out


@pytest.mark.parametrize("columns", [64, 65, 576, 9000])
def test_rms_norm(columns: int) -> None:
    """Also off every multiple of 16 bytes, and as every third head of a token."""
    x, weight = torch.randn(6, columns).bfloat16(), torch.randn(columns).bfloat16()
    alone = torch.cat([normed(row[None], weight) for row in x])
    assert torch.equal(normed(x, weight), alone)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert torch.equal(normed(shifted, weight), alone)
    heads = torch.stack([x, x, x], 1).view(2, 9, columns)[:, ::3]
    assert torch.equal(normed(heads, weight), alone.view(2, 3, columns))


ROWS = (1, 5, 16, 17, 33, 64)  # on both sides of every change of tile


@pytest.mark.parametrize("outputs", [(40, 24), (2930, 30)], ids=["chunks apart", "chunks together"])
def test_linear(outputs: tuple[int, ...]) -> None:
    """Also beside wild rows, and with each weight in a launch of its own: then of another configuration."""
    K, N = 1104, sum(outputs)
    x, weights = torch.randn(64, K).half(), [torch.randn(n, K).half() for n in outputs]
    biases, residual = [None, torch.randn(outputs[1]).half()], torch.randn(64, N).half()

    def run(x: Tensor, rows: int) -> Tensor:
        out, launches = linear.launches(x[:rows], weights, biases, residual[:rows])
        execute(launches)
        return out

    compile_launches([one for rows in ROWS for one in linear.launches(x[:rows], weights, biases, residual[:rows])[1]])
    whole = run(x, 64)
    for rows in ROWS[:-1]:
        assert torch.equal(run(x, rows), whole[:rows]), rows
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(wild, 9)[1::2], whole[1:9:2])
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        columns = slice(first, first + len(weight))
        alone, launches = linear.launches(x[:5], [weight], [bias], residual[:5, columns])
        execute(launches)
        assert torch.equal(alone, whole[:5, columns])
        first += len(weight)


def test_codebook_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside wild rows, and with the codes in one range."""
    codebook, bias = torch.randn(2, 150, 72).bfloat16(), torch.randn(2, 150)

    def run(x: Tensor) -> list[Tensor]:
        results, launches = codebook_topk.launches(x, codebook, bias, 5, True, True)
        execute(launches)
        return [result.flatten(1).float() for result in results]

    x = torch.randn(70, 144).bfloat16()
    whole = torch.cat(run(x), 1)
    for rows in (1, 17, 64):
        assert torch.equal(torch.cat(run(x[:rows]), 1), whole[:rows]), rows
    wild = x.clone()
    wild[::2] = torch.nan
    assert torch.equal(torch.cat(run(wild), 1)[1::2], whole[1::2])
    monkeypatch.setattr(codebook_topk, "PROGRAMS", 1)
    assert torch.equal(torch.cat(run(x), 1), whole)
