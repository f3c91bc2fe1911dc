"""merge_attention in CUDA C++: what its subject does not say."""

import mmap

import torch
from cuda_device import call, compiled
from cuda_subjects.merge_attention import SUBJECT


def test_rows_beyond_32_bit_offsets() -> None:
    """Two rows 2^31 + 64 elements apart, in memory that is only reserved."""
    stride = 2**31 + 64
    memory = mmap.mmap(-1, 2 * stride + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 1, 2, 64), (stride, stride, stride, 1))
    far.copy_(torch.randn(1, 1, 2, 64))
    near, lse_a, lse_b = torch.randn(1, 1, 2, 64).half(), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
    for args in ((far, lse_a, near, lse_b), (near, lse_a, far, lse_b)):
        SUBJECT.check(call("merge_attention", *args)[0], args)


def test_registers() -> None:
    """Four blocks of 256 threads a multiprocessor: at most 64 registers."""
    for (kernel, architecture), used in compiled("merge_attention").usage.items():
        assert used.registers <= 64, (kernel, architecture)
        assert used.shared <= 4096
