"""Theoretical occupancy: how many blocks of a kernel a multiprocessor can hold, and what stops it from holding more.

The rules are those of NVIDIA's cuda_occupancy.h, which the tests compile and compare with.
"""

from dataclasses import dataclass

KIB = 1024
REGISTERS = 65536  # of a multiprocessor, and the most a block may have
PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers
RESERVED = KIB  # shared memory that the system takes from every block


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one compute capability: resident warps and blocks, bytes of shared memory (a block gets 1 KiB less)."""

    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * KIB),
    "sm_86": Multiprocessor(48, 16, 100 * KIB),
    "sm_89": Multiprocessor(48, 24, 100 * KIB),
    "sm_90": Multiprocessor(64, 32, 228 * KIB),
    "sm_100": Multiprocessor(64, 32, 228 * KIB),
}


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks (0: cannot be launched), the share of the warps they fill, what limits them."""

    blocks: int
    share: float
    limit: str


def occupancy(arch: str, registers: int, shared: int, warps: int) -> Occupancy:
    """Of blocks of `warps` warps with `registers` a thread and `shared` bytes, static and dynamic.

    >>> occupancy("sm_80", 255, 0, 4)
    Occupancy(blocks=2, share=0.125, limit='registers')
    """
    device = MULTIPROCESSORS[arch]
    of_warp = _up(32 * registers, 256)
    fits = of_warp * _up(warps, PARTITIONS) <= REGISTERS
    limits = {
        "warps": device.warps // warps,
        "blocks": device.blocks,
        "registers": REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps if of_warp and fits else 0,
        "shared": device.shared // _up(shared + RESERVED, 128),
    }
    least = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[least], limits[least] * warps / device.warps, least)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
