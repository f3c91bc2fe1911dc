"""vq_logits in CUDA C++: a row's bits among any rows, scores far apart, and what it does with a row's scores."""

import dataclasses
import mmap

import pytest
import torch
from cuda_device import call
from subjects.vq_logits import make

from scrimp._registry import OPS

FORMS = {"shared memory": (1100, torch.bfloat16), "token by token": (1101, torch.float16)}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_has_the_same_bits_among_any_rows(name: str) -> None:
    """Integers: the scores' bits are those of another op."""
    V, dtype = FORMS[name]
    h, codebook, codes, bias = make(11, 8, 37, V, 2, dtype, bias=True)
    h, codebook = h.round(), codebook.round()
    whole = call("vq_logits", h, codebook, codes, bias)[0]
    for rows in (1, 3, 4, 5, 8):
        assert torch.equal(call("vq_logits", h[:rows], codebook, codes, bias)[0], whole[:rows]), rows
    h[::2] = torch.nan
    assert torch.equal(call("vq_logits", h, codebook, codes, bias)[0][1::2], whole[1::2])


def test_scores_beyond_32_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 2^30 + 8 scores, in memory that is only reserved."""
    K = 2**30 + 8
    memory = mmap.mmap(-1, 6 * K, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    scores = torch.frombuffer(memory, dtype=torch.float16).view(3, K)
    codes = torch.tensor([0, 7, K - 1, 2**29, K], dtype=torch.int32)
    scores[:, codes[:4].long()] = torch.randn(3, 4).half()
    monkeypatch.setitem(OPS, "linear", dataclasses.replace(OPS["linear"], reference=lambda *_: scores))
    h, codebook = torch.zeros(3, 0).half(), torch.zeros(K, 0).half()
    logits, _ = call("vq_logits", h, codebook, codes, None)
    assert torch.equal(logits[:, :4], scores[:, codes[:4].long()])
    assert bool(logits[:, 4].isnan().all())
