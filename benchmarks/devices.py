"""GPUs by their makers' data sheets: peak rates, which no kernel reaches."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates of one GPU.

    Args:
        name: the product.
        flops: per second: dense fp16 and bf16 products on tensor cores with fp32 sums ("16"), fp32 on the other ("32").
        memory: bytes per second of the device memory.
        cache: bytes of the last-level cache, which all multiprocessors share.
        exps: exponentials per second (16 per clock and multiprocessor); None where no data sheet says so.
        source: where the figures stand.
    """

    name: str
    flops: Mapping[str, float]
    memory: float
    cache: int
    exps: float | None
    source: str


_SFU = "CUDA C++ Programming Guide, throughput of native arithmetic instructions"

DEVICES = {
    "h100": Device(
        "NVIDIA H100 SXM5 80 GB",
        {"16": 989.4e12, "32": 66.9e12},
        3.35e12,
        50 * 2**20,
        132 * 16 * 1.83e9,
        f"NVIDIA H100 Tensor Core GPU Architecture (white paper); {_SFU}",
    ),
    "a100": Device(
        "NVIDIA A100 SXM4 80 GB",
        {"16": 312e12, "32": 19.5e12},
        2.039e12,
        40 * 2**20,
        108 * 16 * 1.41e9,
        f"NVIDIA A100 Tensor Core GPU Architecture (white paper), A100 80 GB data sheet; {_SFU}",
    ),
    "rtx4090": Device(
        "NVIDIA GeForce RTX 4090",
        {"16": 165.2e12, "32": 82.6e12},
        1.008e12,
        72 * 2**20,
        128 * 16 * 2.52e9,
        f"NVIDIA Ada GPU Architecture (white paper); {_SFU}",
    ),
    "mi300x": Device(
        "AMD Instinct MI300X",
        {"16": 1307.4e12, "32": 163.4e12},
        5.3e12,
        256 * 2**20,
        None,
        "AMD Instinct MI300X data sheet; the cache is the Infinity Cache; the rate of exponentials is not modelled",
    ),
}
