"""What the PTX parser and the decoder accept, and how they refuse."""

import numpy as np
import ptx
import pytest
from ptx.core import handlers
from ptx.opcodes import FAMILIES
from ptx.parser import parse
from snippets import run, snippet


def test_unsupported_instructions_are_named():
    for line in (
        "wgmma.fence.sync.aligned;", "cp.async.bulk.commit_group;", "add.rn.ftz.q8 %d0, %tid, 1;",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1};",
        "tex.1d.v4.f32.s32 {%r1,%r2,%r3,%r4}, [%l1, {%r1}];", "fma.rn.oob.f16 %h1, %h2, %h3, %h4;",
    ):  # fmt: skip
        opcode = line.split()[0].rstrip(";")
        with pytest.raises(ptx.PtxError) as caught:
            run("mov.u32 %d0, 0;" + line)
        assert opcode in str(caught.value)


def test_malformed_operands():
    with pytest.raises(ptx.PtxError, match="unknown label"):
        run("mov.u32 %d0, 0; bra $NOWHERE;")
    with pytest.raises(ptx.PtxError, match="'%nothing' is unknown"):
        run("mov.u32 %d0, %nothing;")
    with pytest.raises(ptx.PtxError, match="64 bits where 32"):
        run("add.u32 %d0, %l1, %tid;")
    with pytest.raises(ptx.PtxError, match="number of fragment registers"):
        run("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2}, {%r1,%r2};")
    with pytest.raises(ptx.PtxError, match="unbalanced braces"):
        ptx.load(".visible .entry k() { ret;")
    with pytest.raises(ptx.PtxError, match="is not one of"):
        ptx.load(".visible .entry k() { ret; }").launch("other", 1, 1, [])


def test_scoped_registers():
    """Inline assembly declares registers in braces of its own, twice under the same name."""
    body = """
    { .reg .pred p; .reg .b32 t; setp.lt.u32 p, %tid, 4; mov.u32 t, 5; @p add.u32 t, t, 1; mov.u32 %d0, t; }
    { .reg .b64 t<2>; mov.u64 t0, 9; cvt.u32.u64 %d1, t0; { .reg .b32 t; mov.u32 t, 3; add.u32 %d1, %d1, t; } }
    """
    first, second = run(body, outputs=[np.uint32] * 2)
    assert first.tolist() == [6] * 4 + [5] * 28
    assert set(second.tolist()) == {12}


def test_literals():
    body = """
    mov.b32 %d0, 0f3F800000; add.f32 %d1, %d0, 0f40000000; mov.u32 %d2, 0x1F; mov.s32 %d3, -7;
    mov.f64 %d4, 0d3FF8000000000000; add.u64 %d5, %d4, -1; add.f32 %d6, %d0, 0.5;
    mov.u16 %h1, 5; or.b16 %h2, %h1, -256; cvt.u32.u16 %d7, %h2; mov.pred %p1, -1; selp.u32 %d8, -1, 0, %p1;
    """
    kinds = [np.float32, np.float32, np.uint32, np.int32, np.float64, np.uint64, np.float32, np.uint32, np.int32]
    got = [value[0] for value in run(body, outputs=kinds)]
    assert got == [1.0, 3.0, 31, -7, 1.5, 0x3FF7FFFFFFFFFFFF, 1.5, 0xFF05, -1]


def test_comments_locations_and_several_entries():
    text = snippet(
        "/* a ; comment { */ mov.u32 %d0, 1; // bra $X;\n .loc 1 2 3, function_name $L, inlined_at 1 4 5\n",
        [],
        [np.uint32],
    )
    other = text.replace("snippet(", "second(").replace("mov.u32 %d0, 1", "mov.u32 %d0, 2").partition(".visible")
    module = ptx.load(text + "\n.func helper() { ret; }\n.extern .func outside(.param .b32 a);\n" + other[1] + other[2])
    assert module.entries == ["snippet", "second"]
    for name, expected in (("snippet", 1), ("second", 2)):
        out = np.zeros(1, np.uint32)
        module.launch(name, 1, 1, [out])
        assert out[0] == expected


def test_lines_are_those_of_the_text():
    text = snippet("mov.u32 %d0, 0;\n\n    ld.global.u32 %d0, [%at0+4096];", [], [np.uint32])
    with pytest.raises(ptx.EmulatorError) as caught:
        ptx.load(text.replace("st.global", "// st").replace("%at0+4096", "%base0")).launch("snippet", 1, 1, [0])
    assert text.splitlines()[caught.value.line - 1].strip().startswith("ld.global")


def test_launch_checks_its_arguments():
    module = ptx.load(snippet("mov.u32 %d0, 0;", [], [np.uint32]))
    out = np.zeros(64, np.uint32)
    with pytest.raises(ValueError, match="2 arguments for 1 parameters"):
        module.launch("snippet", 1, 32, [out, out])
    with pytest.raises(ValueError, match="2048 threads"):
        module.launch("snippet", 1, 2048, [out])
    with pytest.raises(ValueError, match="not contiguous"):
        module.launch("snippet", 1, 32, [out[::2]])
    with pytest.raises(ValueError, match="order 'random'"):
        module.launch("snippet", 1, 32, [out], order="random")


def test_assertions_trap():
    """nvcc and Triton write a failed assertion as a call that never returns."""
    body = """
    mov.u32 %d0, 0; setp.eq.u32 %p1, %tid, 3; @!%p1 bra $FINE;
    mov.u64 %l1, 0;
    { .param .b64 param0; st.param.b64 [param0], %l1; call.uni __assertfail, (param0); }
    $FINE: mov.u32 %r1, 0;
    """
    with pytest.raises(ptx.EmulatorError) as caught:
        run(body)
    assert (caught.value.kind, caught.value.lane) == ("trap", 3)
    with pytest.raises(ptx.PtxError, match="unsupported instruction 'call'"):
        run("mov.u32 %d0, 0; call.uni helper, (%d0);")


def test_triton_headers_parse():
    text = """
    .version 8.8
    .target sm_80
    .extern .shared .align 16 .b8 global_smem[];
    .visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .f32 k_param_1)
    .reqntid 128
    { .reg .pred %p<2>; ret; }
    """
    entry = parse(text).entries["k"]
    assert entry.required_threads == (128, 1, 1)
    assert [(p.name, p.offset, p.size) for p in entry.parameters] == [("k_param_0", 0, 8), ("k_param_1", 8, 4)]


def test_every_family_is_reachable():
    """The decoder names no handler that the core lacks, for the opcodes listed in the tables."""
    assert len(handlers()) > 250
    assert {"mma", "ldmatrix", "cp", "shfl", "bar", "atom", "cvt", "lop3"} <= FAMILIES.keys()
