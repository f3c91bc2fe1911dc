"""A PTX emulator: executes the PTX that Triton and nvcc emit for sm_80, without a GPU.

    module = ptx.load(text)
    counters = module.launch("kernel", grid, block, {"x": tensor, "n": 7}, shared_bytes=..., order="warp")

`parser` reads the text, `encoder` and `opcodes` decode one entry into a dense program, `core/` (C++,
built on first use into `SCRIMP_CACHE` or `~/.cache/scrimp`) runs it: a warp is 32 lanes of every
register row, the lanes at the lowest program counter go first, blocks run one after the other.
`toolchain` and `nvcc` get PTX out of the compilers, `counters` is what a profiler would count.

What a launch proves: the compilers' own output, inline assembly included, computes what the oracle
computes; every global, shared, local and parameter access lies inside its buffer and is aligned; no
shared byte is read before it was written; accesses of different warps are ordered by barriers, in any
schedule that meets the same barriers; a cp.async copy is waited for before anybody touches its bytes
(it happens at the wait that forces it); barriers are reached by all threads; warp-wide instructions
read only lanes that take part. The first violation raises `EmulatorError`.

What it does not prove: ex2, rcp, sin and the like are exact here, not the hardware's approximations;
mma sums in float64 and rounds once, so no tolerance may be tuned to it; races inside a warp (a missing
__syncwarp) and between blocks, flags and spin locks in memory, and the memory model are not checked
(only barriers order shared memory; with barriers of interleaving subsets of warps the checker may
report reads that are in fact ordered); the step from PTX to SASS is not executed. Nothing here was
compared with a GPU, and nothing it says is a time.

Not implemented, and refused by name: wgmma, tcgen05, TMA and mbarrier (sm_90 and later), wmma, textures,
surfaces, calls of device functions, 8-bit floats.
"""

from .counters import Counters
from .errors import EmulatorError, PtxError
from .launch import Module, Struct, bytes_of
from .nvcc import CudaObject, Usage, compile_cuda, compile_cuda_object, nvcc_version
from .toolchain import (
    Compiled,
    TritonRequest,
    compile_triton,
    compile_triton_all,
    triton_request,
    triton_version,
)


def load(text: str) -> Module:
    """Parse a PTX module; entries are decoded when first launched."""
    return Module(text)


__all__ = [
    "Compiled",
    "Counters",
    "CudaObject",
    "EmulatorError",
    "Module",
    "PtxError",
    "Struct",
    "TritonRequest",
    "Usage",
    "bytes_of",
    "compile_cuda",
    "compile_cuda_object",
    "compile_triton",
    "compile_triton_all",
    "load",
    "nvcc_version",
    "triton_request",
    "triton_version",
]
