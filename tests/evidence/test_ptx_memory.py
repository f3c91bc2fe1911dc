"""Memory of the PTX emulator: spaces, widths, atomics, asynchronous copies, faults, counters."""

import numpy as np
import ptx
import pytest
import torch
from snippets import count, run

SHARED = ".shared .align 16 .b8 tile[4096];"
BYTES = np.array([0x80, 0x7F, 0xFF, 0x01], np.uint8)


def fault(body: str, inputs=(), outputs=(np.uint32,), **options) -> ptx.EmulatorError:
    with pytest.raises(ptx.EmulatorError) as caught:
        run(body, inputs, outputs, **options)
    return caught.value


def test_widths_and_signs():
    body = """
    ld.global.s8 %d0, [%at0]; ld.global.u8 %d1, [%at0]; ld.global.s8 %d2, [%at0]; ld.global.s8 %d3, [%at0];
    ld.global.nc.L1::no_allocate.L2::128B.s16 %d4, [%at1+-2];
    """
    words = np.arange(-16, 16, dtype=np.int16)
    inputs = [BYTES, words]
    body = body.replace("[%at1+-2]", "[%at1]")
    signed, unsigned, half, wide, short = run(body, inputs, [np.int32, np.uint32, np.int16, np.int64, np.int32])
    expected = np.resize(BYTES.view(np.int8), 32)
    np.testing.assert_array_equal(signed, expected)
    np.testing.assert_array_equal(unsigned, np.resize(BYTES, 32))
    np.testing.assert_array_equal(half, expected)
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(short, words)


def test_vectors():
    body = """
    mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 16, %r1;
    st.shared.v4.b32 [%r2], {%a0, %a1, 7, %a0}; ld.shared.v2.b64 {%l1, %d0}, [%r2];
    ld.shared.v4.u32 {_, %d1, %d2, _}, [%r2];
    ld.shared.v2.u8 {%h1, %h2}, [%r2+8]; cvt.u32.u16 %d3, %h1;
    """
    a, b = np.arange(32, dtype=np.uint32), np.arange(32, dtype=np.uint32) + 100
    upper, second, third, byte = run(
        body, [a, b], [np.uint64, np.uint32, np.uint32, np.uint32], declarations=SHARED, order="warp"
    )
    np.testing.assert_array_equal(upper, a.astype(np.uint64) << np.uint64(32) | np.uint64(7))
    np.testing.assert_array_equal(second, b)
    assert set(third.tolist()) == {7}
    assert set(byte.tolist()) == {7}


def test_generic_and_local_addresses():
    body = """
    .local .align 8 .b8 stack[32];
    mov.u64 %l1, tile; cvta.shared.u64 %l2, %l1; mad.wide.u32 %l2, %tid, 4, %l2; st.u32 [%l2], %a0;
    mov.u64 %l3, stack; cvta.local.u64 %l4, %l3; st.u32 [%l4+8], %a1; st.local.u32 [%l3+12], %tid;
    isspacep.shared %p1, %l2; isspacep.local %p2, %l4; isspacep.global %p3, %at0;
    setp.lt.u32 %p4, %tid, 16; selp.b64 %l5, %l2, %at0, %p4; ld.u32 %d0, [%l5];
    ld.local.u32 %d1, [%l3+8]; ld.u32 %d2, [%l4+12]; cvta.to.shared.u64 %l6, %l2; ld.shared.u32 %d3, [%l6];
    and.pred %p5, %p1, %p2; and.pred %p5, %p5, %p3; selp.u32 %d4, 1, 0, %p5;
    """
    a, b = np.arange(32, dtype=np.uint32) + 5, np.arange(32, dtype=np.uint32) * 3
    got = run(body, [a, b], [np.uint32] * 5, declarations=SHARED)
    for value, expected in zip(got, [a, b, np.arange(32), a, np.ones(32)], strict=True):
        np.testing.assert_array_equal(value, expected)


def test_module_variables():
    declarations = """
    .const .align 4 .b8 table[8] = {1, 2, 3, 4, 0xFF};
    .global .align 4 .u32 total = 5;
    """
    body = """
    and.b32 %r1, %tid, 7; cvt.u64.u32 %l1, %r1; mov.u64 %l2, table; add.s64 %l3, %l2, %l1; ld.const.u8 %d0, [%l3];
    atom.global.add.u32 %d1, [total], 2;
    """
    table, before = run(body, outputs=[np.uint32] * 2, declarations=declarations)
    assert table.tolist() == [1, 2, 3, 4, 255, 0, 0, 0] * 4
    assert before.tolist() == list(range(5, 69, 2))


def test_structure_parameters():
    text = """
    .version 8.8
    .target sm_80
    .visible .entry k(.param .u64 k_out, .param .align 8 .b8 k_config[16], .param .f32 k_scale, .param .u8 k_small) {
    .reg .b32 %r<9>; .reg .b64 %rd<5>; .reg .b16 %rs<3>;
    ld.param.u64 %rd1, [k_out]; ld.param.u32 %r1, [k_config+4]; ld.param.u64 %rd2, [k_config+8];
    ld.param.f32 %r2, [k_scale]; ld.param.u8 %rs1, [k_small]; cvt.u32.u16 %r3, %rs1;
    mov.b64 {%r4, %r5}, %rd2; cvta.to.global.u64 %rd3, %rd1;
    st.global.v4.b32 [%rd3], {%r1, %r4, %r2, %r3}; ret; }
    """
    out = np.zeros(4, np.uint32)
    config = np.array([1, 2, 3, 4], np.uint32).tobytes()
    ptx.load(text).launch("k", 1, 1, [out, config, 0.5, 200])
    assert out.tolist() == [2, 3, 0x3F000000, 200]


def atomics(op: str, start: int, values: np.ndarray, kind=np.uint32, extra: str = "") -> tuple[np.ndarray, int]:
    bits = 8 * np.dtype(kind).itemsize
    body = f"atom.global.{op} %d0, [%base1], %a0{extra}; ld.global.b{bits} %d1, [%base1];"
    memory = np.zeros(32, kind)
    memory[0] = start
    old, now = run(body, [values.astype(kind), memory], [kind, kind])
    return old, now[0]


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space):
    values = np.arange(1, 33)
    if space == "shared":
        body = """
        mov.u32 %r1, tile; setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [%r1], 0; bar.sync 0;
        atom.shared.add.u32 %d0, [%r1], %a0; red.shared.max.u32 [%r1+0], 3; bar.sync 0; ld.shared.u32 %d1, [%r1];
        """
        _, total = run(body, [np.arange(64, dtype=np.uint32)], [np.uint32] * 2, threads=64, declarations=SHARED)
        assert set(total.tolist()) == {64 * 63 // 2}
        return
    assert atomics("add.u32", 7, values)[1] == 7 + 528
    assert atomics("add.u32", 7, values)[0].tolist() == [7 + n * (n + 1) // 2 for n in range(32)]
    assert atomics("min.s32", 5, values - 10, np.int32)[1] == -9
    assert atomics("max.u32", 5, values)[1] == 32
    assert atomics("xor.b32", 0, values)[1] == np.bitwise_xor.reduce(values)
    assert atomics("and.b32", 0xFF, values | 0x10)[1] == 0x10
    assert atomics("or.b64", 0, values.astype(np.uint64) << np.uint64(30), np.uint64)[1] == 63 << 30
    assert atomics("exch.b32", 9, values)[1] == 32
    assert atomics("inc.u32", 0, np.full(32, 4))[1] == 32 % 5
    assert atomics("dec.u32", 0, np.full(32, 4))[0].tolist() == [0, 4, 3, 2, 1] * 6 + [0, 4]
    assert atomics("cas.b32", 1, values, extra=", 77")[1] == 77
    assert atomics("add.f32", 0, values, np.float32)[1] == 528
    assert atomics("add.f64", 0, values, np.float64)[1] == 528


def test_half_atomics():
    memory = np.zeros(32, np.uint32)
    pair = np.uint32(0x3C00_4000)  # (1, 2) high, low
    body = "atom.global.add.noftz.f16x2 %d0, [%base1], %a0; ld.global.b32 %d1, [%base1];"
    _, now = run(body, [pair, memory], [np.uint32] * 2)
    assert hex(now[0]) == "0x50005400"  # 32 and 64


COPY = """
    mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 16, %r1; mul.wide.u32 %l1, %tid, 16; add.s64 %l2, %base0, %l1;
"""
TABLE = np.arange(512, dtype=np.uint32)


def copy(body: str, outputs=(np.uint32,), threads: int = 64, **options):
    """Each thread copies 16 bytes of the table to its place in the tile."""
    inputs = [TABLE.view(np.uint8)]
    text = COPY + body
    arrays = [np.resize(value, 2048) for value in inputs]
    from snippets import snippet

    results = [np.zeros(threads, kind) for kind in outputs]
    module = ptx.load(snippet(text, arrays, outputs, SHARED))
    counters = module.launch("snippet", 1, threads, [*arrays, *results], **options)
    return (*results, counters)


@pytest.mark.parametrize("order", ["lockstep", "warp"])
def test_async_copy(order):
    body = """
    cp.async.cg.shared.global.L2::128B [%r2], [%l2], 16; cp.async.commit_group; cp.async.wait_group 0;
    bar.sync 0; xor.b32 %r3, %tid, 33; mad.lo.u32 %r3, %r3, 16, %r1; ld.shared.u32 %d0, [%r3+4];
    """
    got, counters = copy(body, order=order)
    assert got.tolist() == [((t ^ 33) * 4 + 1) for t in range(64)]
    (wait,) = counters.async_waits
    assert (wait.executions, wait.bytes_before, wait.bytes_after) == (2, 512, 0)


def test_async_groups():
    """A wait for all but the newest group makes the older one visible, the newer one not."""
    body = """
    cp.async.ca.shared.global [%r2], [%l2], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r2+2048], [%l2+16], 8; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.u32 %d0, [%r2];
    """
    rest = "cp.async.wait_all; ld.shared.u32 %d1, [%r2+2048];"
    first, second, counters = copy(body + rest, [np.uint32] * 2, 32)
    assert first.tolist() == [4 * t for t in range(32)]
    assert second.tolist() == [4 * t + 4 for t in range(32)]
    assert [(w.bytes_before, w.bytes_after) for w in counters.async_waits] == [(768, 256), (256, 0)]
    with pytest.raises(ptx.EmulatorError) as caught:
        copy(body + "ld.shared.u32 %d1, [%r2+2048];", [np.uint32] * 2, 32)
    assert caught.value.kind == "async_race"
    uncommitted = body.replace("[%l2+16], 8; cp.async.commit_group;", "[%l2+16], 8;").replace("group 1", "group 0")
    with pytest.raises(ptx.EmulatorError) as caught:
        copy(uncommitted + "ld.shared.u32 %d1, [%r2+2048];", [np.uint32] * 2, 32)
    assert caught.value.kind == "async_race"


def test_async_copy_reads_its_source_late():
    body = """
    cp.async.cg.shared.global [%r2], [%l2], 16; cp.async.commit_group; st.global.u32 [%l2], 7777;
    cp.async.wait_group 0; ld.shared.u32 %d0, [%r2];
    """
    got, _ = copy(body)
    assert set(got.tolist()) == {7777}


def test_async_zero_fill():
    body = """
    and.b32 %r4, %tid, 3; shl.b32 %r4, %r4, 2; setp.eq.u32 %p1, %r4, 0;
    cp.async.cg.shared.global [%r2], [%l2], 16, %r4; cp.async.wait_all;
    ld.shared.u32 %d0, [%r2]; ld.shared.u32 %d1, [%r2+8];
    cp.async.cg.shared.global [%r2], [%l2], 16, %p1; cp.async.wait_all; ld.shared.u32 %d2, [%r2+12];
    """
    first, third, ignored, _ = copy(body, [np.uint32] * 3)
    assert first.tolist() == [4 * t if t % 4 else 0 for t in range(64)]
    assert third.tolist() == [4 * t + 2 if t % 4 == 3 else 0 for t in range(64)]
    assert ignored.tolist() == [4 * t + 3 if t % 4 else 0 for t in range(64)]


def test_async_copy_without_source_may_point_anywhere():
    body = "mov.u64 %l2, 0; cp.async.cg.shared.global [%r2], [%l2], 16, 0; cp.async.wait_all; ld.shared.u32 %d0, [%r2];"
    assert set(copy(body)[0].tolist()) == {0}
    with pytest.raises(ptx.EmulatorError, match="out_of_bounds"):
        copy(body.replace("16, 0;", "16, 4;"))


def test_async_races():
    issue = "cp.async.cg.shared.global [%r2], [%l2], 16; cp.async.commit_group;"
    other = "xor.b32 %r3, %tid, 32; mad.lo.u32 %r3, %r3, 16, %r1;"
    wait = "cp.async.wait_group 0;"
    read = "ld.shared.u32 %d0, [%r3];"
    cases = {
        "no wait": (issue + other + "bar.sync 0;" + read, "async_race"),
        "no barrier after the wait": (issue + other + wait + read, "race"),
        "wait after the barrier": (issue + other + "bar.sync 0;" + wait + read, "race"),
        "overwrites what is still read": (issue + other + wait + "bar.sync 0;" + read + issue + wait, "race"),
    }
    for name, (body, kind) in cases.items():
        for order in ("lockstep", "warp"):
            with pytest.raises(ptx.EmulatorError) as caught:
                copy(body, order=order)
            # Warp by warp, the other warp has not even begun its copy.
            early = {"race", "async_race", "uninitialised"} if "wait" in name and kind == "race" else {kind}
            assert caught.value.kind in early, name
    fine = issue + other + wait + "bar.sync 0;" + read + "bar.sync 0;" + issue + wait
    assert copy(fine)[0].tolist() == [(t ^ 32) * 4 for t in range(64)]


def test_out_of_bounds():
    error = fault("ld.global.u32 %d0, [%at0+4];", [np.arange(32, dtype=np.uint32)])
    assert (error.kind, error.lane) == ("out_of_bounds", 31)
    assert "offset 128 of buffer 'argument 0' of 128 bytes" in error.detail
    assert fault("mov.u64 %l1, 0; ld.global.u32 %d0, [%l1];").kind == "out_of_bounds"
    assert fault("mov.u64 %l1, -4; ld.global.u32 %d0, [%l1];").kind == "out_of_bounds"
    assert fault("mov.u64 %l1, -4; ld.shared.u32 %d0, [%l1];", declarations=SHARED).kind == "out_of_bounds"
    shared = "mov.u32 %r1, tile; ld.shared.u32 %d0, [%r1+4096];"
    assert fault(shared, declarations=SHARED).kind == "out_of_bounds"
    lost_base = "mul.lo.u32 %r1, %tid, 4; st.shared.u32 [%r1], 1; mov.u32 %d0, 0;"
    assert fault(lost_base, declarations=SHARED).kind == "out_of_bounds"
    local = ".local .align 4 .b8 stack[8]; mov.u64 %l1, stack; ld.local.u32 %d0, [%l1+8];"
    assert fault(local).kind == "out_of_bounds"
    empty = torch.empty(0)
    module = ptx.load(
        ".version 8.8\n.target sm_80\n.visible .entry k(.param .u64 p) { .reg .b64 %rd<2>; .reg .b32 %r<2>;"
        "ld.param.u64 %rd1, [p]; ld.global.u32 %r1, [%rd1]; ret; }"
    )
    with pytest.raises(ptx.EmulatorError, match="of buffer 'x' of 0 bytes"):
        module.launch("k", 1, 1, {"x": empty})


def test_tensor_views_end_where_they_end():
    base = torch.arange(64, dtype=torch.int32)
    view = base[8:40]
    error = fault_on(view)
    assert "of 128 bytes" in error.detail


def fault_on(tensor: torch.Tensor) -> ptx.EmulatorError:
    text = (
        ".version 8.8\n.target sm_80\n.visible .entry k(.param .u64 p) { .reg .b64 %rd<4>; .reg .b32 %r<4>;"
        "mov.u32 %r2, %tid.x; ld.param.u64 %rd1, [p]; mad.wide.u32 %rd2, %r2, 4, %rd1;"
        "ld.global.u32 %r1, [%rd2]; ret; }"
    )
    with pytest.raises(ptx.EmulatorError) as caught:
        ptx.load(text).launch("k", 1, tensor.numel() + 1, [tensor])
    return caught.value


def test_misaligned():
    error = fault("add.s64 %l1, %base0, 2; ld.global.u32 %d0, [%l1];", [np.arange(32, dtype=np.uint32)])
    assert error.kind == "misaligned"
    vector = "mad.wide.u32 %l1, %tid, 8, %base0; ld.global.v4.u32 {%d0, %r1, %r2, %r3}, [%l1];"
    assert fault(vector, [np.arange(32, dtype=np.uint32)]).kind == "misaligned"


def test_uninitialised_shared_memory():
    body = "mov.u32 %r1, tile; ld.shared.u32 %d0, [%r1+4];"
    assert fault(body, declarations=SHARED).kind == "uninitialised"
    got = run(body, declarations=SHARED, check_uninitialised=False)
    assert set(got.tolist()) == {0xFFFFFFFF}
    half_written = "mov.u32 %r1, tile; st.shared.u16 [%r1], 1; bar.sync 0; ld.shared.u32 %d0, [%r1];"
    assert fault(half_written, declarations=SHARED, threads=1).kind == "uninitialised"


def test_bytes_of_different_warps_do_not_race():
    body = "mov.u32 %r1, tile; shr.u32 %r2, %tid, 5; and.b32 %r3, %tid, 31; mad.lo.u32 %r2, %r3, 2, %r2; add.u32 %r1, %r1, %r2; cvt.u16.u32 %h1, %tid; st.shared.u8 [%r1], %h1; mov.u32 %d0, 0;"  # noqa: E501
    run(body, threads=64, declarations=SHARED)
    racing = body.replace("%r3, 2, %r2", "%r3, 1, %r2")
    assert fault(racing, threads=64, declarations=SHARED).kind == "race"
    assert run(racing, threads=64, declarations=SHARED, check_races=False) is not None


def sectors(body: str, values: int = 4096) -> tuple[int, int]:
    counters = count(body, [np.zeros(values, np.uint32)], threads=32)
    return counters.sectors, counters.useful_bytes


def test_sectors():
    """Sectors of 32 bytes and the distinct bytes asked of them; the harness itself loads 4 sectors."""
    table = np.zeros(32, np.uint32)
    cases = {
        "ld.global.u32 %r1, [%at0];": (4, 128),
        "ld.global.u32 %r1, [%base0];": (1, 4),
        "mul.wide.u32 %l1, %tid, 1; add.s64 %l1, %l1, %base0; ld.global.u8 %h1, [%l1];": (1, 32),
        "and.b32 %r2, %tid, 3; mul.wide.u32 %l1, %r2, 32; add.s64 %l1, %l1, %base0; ld.global.u16 %h1, [%l1];": (4, 8),
        "setp.lt.u32 %p1, %tid, 8; @%p1 ld.global.u32 %r1, [%at0];": (1, 32),
    }
    for body, expected in cases.items():
        counters = count(body, [table])
        assert (counters.sectors - 4, counters.useful_bytes - 128) == expected, body


def test_bank_conflicts():
    """Passes over shared memory of one warp: stride, broadcast, wide accesses."""
    cases = [
        ("%tid, 4", "u32 %r3", 0), ("%tid, 8", "u32 %r3", 1), ("%tid, 128", "u32 %r3", 31), ("0, 4", "u32 %r3", 0),
        ("%tid, 16", "v4.u32 {%r3, %r4, %r5, %r6}", 0), ("%tid, 32", "v4.u32 {%r3, %r4, %r5, %r6}", 4),
        ("%tid, 8", "v2.u32 {%r3, %r4}", 0), ("%tid, 2", "u16 %h1", 0),
    ]  # fmt: skip
    for index, access, extra in cases:
        body = f"mov.u32 %r1, tile; mad.lo.u32 %r2, {index}, %r1; ld.shared.{access}, [%r2];"
        counters = count(body, declarations=SHARED, check_uninitialised=False)
        assert counters.bank_conflicts == extra, (index, access)
        assert counters.shared_accesses == 1
        assert counters.conflicted_accesses == int(extra > 0)


def test_counters_by_class():
    body = "mov.u32 %r1, 1; add.u32 %r2, %r1, 1; setp.lt.u32 %p1, %tid, 8; @%p1 ex2.approx.f32 %r3, %r2; bar.sync 0;"
    counters = count(body, threads=64)
    assert counters.by_class == {"move": 4, "integer": 4, "special": 2, "barrier": 2, "control": 2}
    (special,) = [row for row in counters.rows if row.kind == "special"]
    assert (special.values["warps"], special.values["threads"]) == (2, 8)
    assert counters.summary()["warp_instructions"] == 14
