"""The reader of SASS listings and AMD metadata, on texts written by hand."""

import pytest
from passport import amdgpu, sass

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function attend:
  REG:255 STACK:24 SHARED:{shared} LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# A loop that only loads, then a loop with products that holds a loop of conversions, then the end.
LINES = """
MOV R1, c[0x0][0x28]
@!P0 LDG.E R9, [R12.64]
LDG.E.U16 R9, [R12.64+0x10]
@P1 BRA 0x10
LDGSTS.E.BYPASS.128 [R3], [R4.64]
LDSM.16.M88.4 R4, [R5]
HMMA.16816.F32.BF16 R4, R8, R12, R4
HMMA.16816.F32.BF16 R8, R8, R12, R4
F2FP.BF16.PACK_AB R4, R5, R6
@!UP0 BRA 0x80
LDG.E.128.CONSTANT R8, [R2.64]
STL [R1+0x4], R9
BAR.SYNC 0x0
@P2 BRA 0x40
@P3 BRA 0x110
LDL.64 R4, [R1]
STG.E.64 [R2.64], R4
MUFU.EX2 R3, R4
EXIT
BRA 0x130
NOP
LDG.E R9, [R12.64]
"""


def listing(arch: int = 80) -> str:
    lines = []
    for index, line in enumerate(LINES.strip().splitlines()):
        lines.append(f"        /*{16 * index:04x}*/  {line} ;      /* 0x00000a0000017a02 */")
        lines.append("                                            /* 0x000fe40000000f00 */")
    text = "\n".join(lines)
    return f'\n\tcode for sm_{arch}\n\t\tFunction : attend\n\t.headerflags\t@"EF"\n{text}\n\t\t..........\n'


def kernel(arch: int = 80, shared: int = 0) -> sass.Kernel:
    (found,) = sass.parse(USAGE.format(shared=shared) + listing(arch))
    return found


def test_resources() -> None:
    found = kernel(shared=2048)
    assert (found.name, found.registers, found.stack, found.shared) == ("attend", 255, 24, 2048)
    assert kernel(90, 1024 + 512).shared == 512  # without the system's own KiB
    assert kernel(90, 0).shared == 0
    assert found.spills == 2


def test_instructions() -> None:
    found = kernel().instructions
    assert len(found) == 19, "nothing behind the branch to itself"
    assert (found[1].guard, found[1].opcode, found[1].operands) == ("@!P0", "LDG.E", "R9, [R12.64]")
    assert [i.width for i in found if i.base in ("LDG", "STG", "LDL")] == [32, 16, 128, 64, 64]


def test_loops() -> None:
    found = kernel()
    assert sass.loops(found) == [(0x10, 0x30), (0x40, 0xD0), (0x80, 0x90)]
    (hot,) = sass.hot_loops(found)
    assert (hot[0].address, hot[-1].address) == (0x40, 0xD0)
    assert sass.mix(hot) == {
        "instructions": 10,
        "tensor": {"HMMA.16816.F32.BF16": 2},
        "async_copies": {"LDGSTS.E.BYPASS.128": 1},
        "conversions": {"F2FP.BF16.PACK_AB": 1},
        "global_loads": {"128": 1},
        "matrix_loads": 1,
        "barriers": 1,
        "spills": 1,
    }


def test_hot_loops_without_products() -> None:
    found = kernel()
    plain = tuple(i for i in found.instructions if i.base != "HMMA")
    assert [loop[0].address for loop in sass.hot_loops(sass.Kernel("k", 1, 0, 0, 0, plain))] == [0x10, 0x80]
    straight = tuple(i for i in plain if i.base != "BRA")
    assert sass.hot_loops(sass.Kernel("k", 1, 0, 0, 0, straight)) == [list(straight)]


def test_unknown_listing() -> None:
    with pytest.raises(ValueError, match="names no architecture"):
        sass.parse("nothing")


AMD = """
    v_mfma_f32_32x32x16_bf16 a[0:15], v[0:3], v[4:7], 0
    v_smfmac_f32_16x16x32_f16 v[0:3], v[4:5], v[6:9], v10
amdhsa.kernels:
  - .agpr_count:     4
    .group_segment_fixed_size: 64
    .sgpr_count:     36
    .sgpr_spill_count: 1
    .vgpr_count:     128
    .vgpr_spill_count: 2
"""


def test_amd() -> None:
    assert amdgpu.resources(AMD) == {
        "vgprs": 128, "agprs": 4, "sgprs": 36, "vgpr_spills": 2, "sgpr_spills": 1, "shared": 64, "mfma": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"lacks \.vgpr_spill_count"):
        amdgpu.resources(AMD[: AMD.index("    .vgpr_spill")])
