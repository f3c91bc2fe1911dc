"""The instantiations of the CUDA kernels that are compiled ahead of time for sm_80 and sm_90a."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaKernel:
    """A torch-free translation unit that includes `csrc/cuda/<op>.cuh` and instantiates its kernels.

    Args:
        op: the op; its passport holds the kernels' records.
        name: unique within the op.
        source: CUDA text; quoted includes are relative to `csrc/`.
    """

    op: str
    name: str
    source: str


CUDA_KERNELS: list[CudaKernel] = []
