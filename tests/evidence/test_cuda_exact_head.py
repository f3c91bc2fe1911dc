"""exact_head in CUDA C++: the calls it takes. Its bits: `test_exact_head_bits.py`."""

import torch
from subjects.exact_head import make

from scrimp.ops.exact_head import _cuda_takes


def test_what_it_takes() -> None:
    """16-bit heads whose vectors of 16 bytes are whole."""
    x, weight, *rest = make(3, 64, 70, 2, torch.float16)
    assert _cuda_takes(x, weight, *rest)
    assert _cuda_takes(x[:0], weight, *rest)
    assert not _cuda_takes(x.float(), weight.float(), *rest)
    assert not _cuda_takes(x[:, :60], weight[:, :60], *rest)
    assert not _cuda_takes(x, torch.cat([weight, weight], 1)[:, 4:68], *rest)
    assert not _cuda_takes(x, torch.cat([weight, weight[:, :4]], 1)[:, :64], *rest)
    assert not _cuda_takes(x[:, :0], weight[:, :0], *rest)
