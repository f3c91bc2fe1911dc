"""The reader of SASS listings and AMD metadata, on texts written by hand."""

import re

import pytest
from passport import amdgpu, sass
from passport.control_flow import natural_loops

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function attend:
  REG:255 STACK:24 SHARED:{shared} LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# A loop that only loads, then a loop with products that holds a loop of conversions, then the end; behind it a block
# of the outer loop that was moved there and jumps back.
LINES = """
MOV R1, c[0x0][0x28]
@!P0 LDG.E R9, [R12.64]
LDG.E.U16 R9, [R12.64+0x10]
@P1 BRA 0x10
LDGSTS.E.BYPASS.128 [R3], [R4.64]
LDGDEPBAR
DEPBAR.LE SB0, 0x2
LDSM.16.M88.4 R4, [R5]
HMMA.16816.F32.BF16 R4, R8, R12, R4
HMMA.16816.F32.BF16 R8, R8, R12, R4
F2FP.BF16.PACK_AB R4, R5, R6
@!UP0 BRA 0xa0
LDG.E.128.CONSTANT R8, [R2.64]
@P4 BRA 0x150
BAR.SYNC 0x0
@P2 BRA 0x40
@P3 BRA 0x130
LDL.64 R4, [R1]
STG.E.64 [R2.64], R4
MUFU.EX2 R3, R4
EXIT
STL [R1+0x4], R9
BRA 0xe0
BRA 0x170
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
    assert len(found) == 23, "nothing behind the branch to itself"
    assert (found[1].guard, found[1].opcode, found[1].operands) == ("@!P0", "LDG.E", "R9, [R12.64]")
    assert [i.width for i in found if i.base in ("LDG", "STG", "LDL")] == [32, 16, 128, 64, 64]


def test_loops() -> None:
    found = kernel()
    inside = [(loop[0].address, loop[-1].address, len(loop)) for loop in sass.loops(found)]
    assert inside == [(0x10, 0x30, 3), (0x40, 0x160, 14), (0xA0, 0xB0, 2)]
    (hot,) = sass.hot_loops(found)
    assert hot == sass.loops(found)[1]
    assert sass.mix(hot) == {
        "instructions": 14,
        "tensor": {"HMMA.16816.F32.BF16": 2},
        "async_copies": {"LDGSTS.E.BYPASS.128": 1},
        "conversions": {"F2FP.BF16.PACK_AB": 1},
        "global_loads": {"128": 1},
        "matrix_loads": 1,
        "barriers": 1,
        "spills": 1,
        "copy_groups": 1,
        "copy_groups_in_flight": 2,
    }


def loops(*lines: str) -> list[list[int]]:
    """Of lines ``OPCODE operands`` at 0x0, 0x10, ..."""
    text = [
        sass.Instruction(16 * k, *re.fullmatch(r"(@\S+)? ?(\S+) ?(.*)", line).groups(""))
        for k, line in enumerate(lines)
    ]
    return [sorted(loop) for loop in natural_loops(text)]


def test_control_flow() -> None:
    assert loops("MOV", "EXIT") == []
    assert loops("MOV", "@P0 BRA 0x0", "EXIT") == [[0, 1]]
    # One head, two jumps back: one loop. A conditional branch may carry its condition among its operands.
    assert loops("MOV", "@P0 BRA 0x0", "MOV", "BRA !P1, 0x0", "EXIT") == [[0, 1, 2, 3]]
    # A block moved behind the end jumps back into code that it does not dominate: no loop.
    assert loops("@P0 BRA 0x30", "MOV", "EXIT", "MOV", "BRA 0x10") == []
    # Two ways into the same cycle: it has no head.
    assert loops("@P0 BRA 0x20", "MOV", "MOV", "@P1 BRA 0x10", "EXIT") == []
    # Threads that met at a barrier go on where BSSY said, here at the head of the loop.
    assert loops("MOV", "BSSY B0, 0x0", "@P0 EXIT", "BSYNC B0", "EXIT") == [[0, 1, 2, 3]]
    # A guarded CALL leaves a loop, and behind it there may be another; without a guard a function returns from it.
    assert loops("MOV", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "MOV", "@P1 BRA 0x30", "EXIT") == [[0, 1, 2], [3, 4]]
    assert loops("MOV", "CALL.REL.NOINC 0x40", "@P0 BRA 0x0", "EXIT", "@P1 BRA 0x40", "RET") == [[0, 1, 2]]
    # Code that is never reached has no loops, and an inner loop may share the outer one's end.
    assert loops("EXIT", "MOV", "BRA 0x10") == []
    assert loops("MOV", "MOV", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT") == [[0, 1, 2, 3], [1, 2]]


def test_hot_loops_without_products() -> None:
    found = kernel()
    plain = tuple(i for i in found.instructions if i.base != "HMMA")
    assert [loop[0].address for loop in sass.hot_loops(sass.Kernel("k", 1, 0, 0, 0, plain))] == [0x10, 0xA0]
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
