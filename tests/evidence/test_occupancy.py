"""Theoretical occupancy against NVIDIA's own calculator: the header that the triton package brings along."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from passport import sass
from passport.occupancy import KIB, MULTIPROCESSORS, occupancy

PROGRAM = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, warps_of_sm, shared_of_sm, registers, shared, warps;
  while (scanf("%d %d %d %d %d %d %d", &major, &minor, &warps_of_sm, &shared_of_sm, &registers, &shared, &warps) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps_of_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = shared_of_sm;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = shared_of_sm - 1024;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = 0;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = shared_of_sm - 1024;
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, 32 * warps, shared)) return 1;
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_against_the_calculator(tmp_path: Path) -> None:
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(PROGRAM)
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    headers = sass.tool("ptxas").parent.parent / "include"
    subprocess.run([compiler, f"-I{headers}", "-w", str(source), "-o", str(program)], check=True)
    registers = [16, 24, 40, 64, 65, 96, 114, 128, 168, 232, 255]
    shared = [0, 1, 5 * KIB, 17 * KIB + 100, 48 * KIB, 65 * KIB, 99 * KIB, 100 * KIB, 163 * KIB, 227 * KIB]
    asked = list(itertools.product(MULTIPROCESSORS, registers, shared, [1, 2, 4, 7, 8, 16]))
    lines = []
    for arch, regs, size, warps in asked:
        number, device = int(arch.removeprefix("sm_")), MULTIPROCESSORS[arch]
        lines.append(f"{number // 10} {number % 10} {device.warps} {device.shared} {regs} {size} {warps}")
    done = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    assert len(expected) == len(asked)
    for case, blocks in zip(asked, expected, strict=True):
        assert occupancy(*case).blocks == blocks, case


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (("sm_80", 32, 0, 4), (16, 1.0, "warps")),
        (("sm_80", 33, 0, 4), (12, 0.75, "registers")),
        (("sm_80", 16, 0, 1), (32, 0.5, "blocks")),
        (("sm_90", 168, 100 * KIB, 4), (2, 0.125, "shared")),
        (("sm_86", 255, 0, 8), (1, 8 / 48, "registers")),
        (("sm_89", 255, 0, 16), (0, 0.0, "registers")),  # 16 warps of 255 registers are more than there are
        (("sm_89", 32, 100 * KIB, 4), (0, 0.0, "shared")),
    ],
)
def test_known_values(case: tuple[str, int, int, int], expected: tuple[int, float, str]) -> None:
    found = occupancy(*case)
    assert (found.blocks, pytest.approx(found.share), found.limit) == expected
