"""The instantiations of the CUDA kernels that are compiled ahead of time for sm_80 and sm_90a."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaKernel:
    """A torch-free translation unit that includes `csrc/cuda/<op>.cuh` and instantiates its kernels.

    Args:
        op: the op; its passport holds the kernels' records.
        name: unique within the op.
        source: CUDA text; quoted includes are relative to `csrc/`.
        threads: of a block.
        dynamic_shared: bytes that the launcher asks for.
    """

    op: str
    name: str
    source: str
    threads: int
    dynamic_shared: int = 0


CUDA_KERNELS: list[CudaKernel] = []
