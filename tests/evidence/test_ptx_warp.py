"""Warp-wide instructions, divergence, barriers and their faults in the PTX emulator."""

import numpy as np
import ptx
import pytest
from snippets import run

LANES = np.arange(32)
VALUES = (LANES * 3 + 100).astype(np.uint32)


def shuffle(mode: str, b: int, c: int) -> tuple[list[int], list[bool]]:
    """The specification's pseudo-code of shfl.sync: source lanes and predicates."""
    sources, valid = [], []
    clamp, mask = c & 31, c >> 8 & 31
    for lane in range(32):
        low = lane & mask
        high = low | clamp & ~mask
        source, ok = {
            "up": (lane - b, lane - b >= high),
            "down": (lane + b, lane + b <= high),
            "bfly": (lane ^ b, (lane ^ b) <= high),
            "idx": (low | b & ~mask, (low | b & ~mask) <= high),
        }[mode]
        sources.append(source if ok else lane)
        valid.append(ok)
    return sources, valid


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("distance", [0, 1, 2, 5, 16, 31])
def test_shuffle(mode, width, distance):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"shfl.sync.{mode}.b32 %d0|%p1, %a0, {distance}, {c}, -1; selp.u32 %d1, 1, 0, %p1;"
    value, flag = run(body, [VALUES], [np.uint32] * 2)
    sources, valid = shuffle(mode, distance, c)
    assert value.tolist() == VALUES[sources].tolist()
    assert flag.astype(bool).tolist() == valid


def test_shuffle_by_lane():
    index = ((LANES * 7 + 3) % 32).astype(np.uint32)
    got = run("shfl.sync.idx.b32 %d0, %a0, %a1, 31, 0xffffffff;", [VALUES, index])
    assert got.tolist() == VALUES[index].tolist()


def test_shuffle_among_half_the_warp():
    body = """
    setp.lt.u32 %p1, %tid, 16; mov.u32 %d0, 0;
    @%p1 bra $L1; bra.uni $L2;
    $L1: shfl.sync.bfly.b32 %d0, %a0, 1, 31, 0x0000ffff;
    $L2: mov.u32 %r1, 0;
    """
    got = run(body, [VALUES])
    assert got.tolist() == np.where(LANES < 16, VALUES[LANES ^ 1], 0).tolist()


def test_vote():
    body = """
    setp.gt.u32 %p1, %a0, 5; setp.ge.u32 %p2, %a0, 0;
    vote.sync.all.pred %p3, %p1, -1; vote.sync.any.pred %p4, %p1, -1; vote.sync.uni.pred %p5, %p2, -1;
    vote.sync.ballot.b32 %d0, %p1, -1; vote.sync.ballot.b32 %d1, !%p1, -1;
    selp.u32 %r1, 1, 0, %p3; selp.u32 %r2, 2, 0, %p4; selp.u32 %r3, 4, 0, %p5;
    or.b32 %d2, %r1, %r2; or.b32 %d2, %d2, %r3;
    """
    yes, no, flags = run(body, [LANES.astype(np.uint32)], [np.uint32] * 3)
    assert set(yes.tolist()) == {0xFFFFFFC0}
    assert set(no.tolist()) == {0x3F}
    assert set(flags.tolist()) == {6}


def test_match_and_redux():
    keys = (LANES // 8 * 10).astype(np.uint32)
    signed = (LANES - 10).astype(np.int32)
    body = """
    match.any.sync.b32 %d0, %a0, -1; match.all.sync.b32 %d1|%p1, %a0, -1; selp.u32 %d2, 1, 0, %p1;
    redux.sync.add.s32 %d3, %a1, -1; redux.sync.min.s32 %d4, %a1, -1; redux.sync.max.u32 %d5, %a1, -1;
    redux.sync.or.b32 %d6, %a0, -1; redux.sync.xor.b32 %d7, %a0, -1; redux.sync.and.b32 %d8, %a0, -1;
    cvt.u64.u32 %l1, %a0; match.any.sync.b64 %d9, %l1, -1; activemask.b32 %d10;
    """
    got = run(body, [keys, signed], [np.uint32] * 3 + [np.int32] * 2 + [np.uint32] * 6)
    assert got[0].tolist() == [0xFF << (lane // 8 * 8) for lane in range(32)]
    assert not got[1].any()
    assert not got[2].any()
    assert got[3][0] == signed.sum()
    assert got[4][0] == -10
    assert got[5][0] == 0xFFFFFFFF
    assert [int(value[0]) for value in got[6:9]] == [0 | 10 | 20 | 30, 0, 0]
    assert got[9].tolist() == got[0].tolist()
    assert set(got[10].tolist()) == {0xFFFFFFFF}


def test_divergent_loop():
    """Each lane runs its own number of iterations; all meet again behind the loop."""
    body = """
    mov.u32 %r1, 0; mov.u32 %d0, 0;
    $LOOP: setp.ge.u32 %p1, %r1, %a0; @%p1 bra $DONE;
    and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0; @%p2 bra $EVEN;
    add.u32 %d0, %d0, 100; bra.uni $NEXT;
    $EVEN: add.u32 %d0, %d0, 1;
    $NEXT: add.u32 %r1, %r1, 1; bra.uni $LOOP;
    $DONE: activemask.b32 %d1; shfl.sync.idx.b32 %d2, %d0, 31, 31, -1;
    """
    total, mask, last = run(body, [LANES.astype(np.uint32)], [np.uint32] * 3)
    assert total.tolist() == [(n + 1) // 2 + n // 2 * 100 for n in range(32)]
    assert set(mask.tolist()) == {0xFFFFFFFF}
    assert set(last.tolist()) == {16 + 1500}


def test_lanes_wait_when_the_common_block_comes_first():
    """The block of the shuffle lies before the blocks that lead to it."""
    body = """
    mov.u32 %r1, 7; setp.lt.u32 %p1, %tid, 9; @%p1 bra $SLOW; bra.uni $FAST;
    $COMMON: shfl.sync.bfly.b32 %d0, %r1, 1, 31, -1; bra.uni $END;
    $FAST: bra.uni $COMMON;
    $SLOW: mov.u32 %r1, 9; bra.uni $COMMON;
    $END: mov.u32 %r2, 0;
    """
    assert run(body).tolist() == [9 if (lane ^ 1) < 9 else 7 for lane in range(32)]


def test_indirect_branch():
    body = """
    and.b32 %r1, %tid, 3;
    $TABLE: .branchtargets $A, $B, $C, $A;
    brx.idx %r1, $TABLE;
    $A: mov.u32 %d0, 10; bra.uni $END;
    $B: mov.u32 %d0, 20; bra.uni $END;
    $C: mov.u32 %d0, 30;
    $END: mov.u32 %r2, 0;
    """
    assert run(body, threads=8).tolist() == [10, 20, 30, 10] * 2


def test_early_exit():
    body = "mov.u32 %d0, 1; setp.ge.u32 %p1, %tid, 40; @%p1 exit; bar.sync 0; mov.u32 %d0, 2;"
    got = run(body, threads=64)
    assert got.tolist() == [2] * 40 + [0] * 24


@pytest.mark.parametrize("order", ["lockstep", "warp"])
def test_barrier_reduction(order):
    body = """
    setp.lt.u32 %p1, %tid, 70;
    bar.red.popc.u32 %d0, 1, %p1; bar.red.and.pred %p2, 2, %p1; bar.red.or.pred %p3, 3, %p1;
    selp.u32 %d1, 1, 0, %p2; selp.u32 %d2, 1, 0, %p3;
    """
    counted, every, some = run(body, outputs=[np.uint32] * 3, threads=128, order=order)
    assert set(counted.tolist()) == {70}
    assert set(every.tolist()) == {0}
    assert set(some.tolist()) == {1}


SHARED = ".shared .align 16 .b8 tile[1024];"
HANDOVER = """
    mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.u32 [%r2], %a0;
    {between}
    xor.b32 %r3, %tid, 32; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.u32 %d0, [%r3];
    {after}
    st.shared.u32 [%r2], 1;
"""


@pytest.mark.parametrize("order", ["lockstep", "warp"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ordered_handover(order, seed):
    body = HANDOVER.format(between="bar.sync 0;", after="barrier.cta.sync.aligned 0;")
    values = np.arange(128, dtype=np.uint32)
    got = run(body, [values], threads=128, declarations=SHARED, order=order, seed=seed)
    assert got.tolist() == (values ^ 32).tolist()


@pytest.mark.parametrize("order", ["lockstep", "warp"])
@pytest.mark.parametrize(
    ("between", "after"), [("", "bar.sync 0;"), ("bar.sync 0;", ""), ("bar.warp.sync -1;", "bar.sync 0;")]
)
def test_missing_barrier(order, between, after):
    body = HANDOVER.format(between=between, after=after)
    with pytest.raises(ptx.EmulatorError, match="not ordered by a barrier") as caught:
        run(body, [VALUES], threads=128, declarations=SHARED, order=order, check_uninitialised=False)
    assert caught.value.kind == "race"
    assert "shared" in caught.value.text


@pytest.mark.parametrize("order", ["lockstep", "warp"])
def test_equal_values_from_several_warps(order):
    """Replicated data: all warps store the same bytes; each may read its own store back at once."""
    body = """
    mov.u32 %r1, tile; and.b32 %r3, %tid, 31; mad.lo.u32 %r2, %r3, 4, %r1; st.shared.u32 [%r2], {value};
    bar.warp.sync -1; xor.b32 %r4, %r3, 1; mad.lo.u32 %r4, %r4, 4, %r1; ld.shared.u32 %d0, [%r4];
    """
    got = run(body.replace("{value}", "%r3"), threads=128, declarations=SHARED, order=order)
    assert got.tolist() == [(t & 31) ^ 1 for t in range(128)]
    for value in ("%tid", "%laneid"):
        later = "mov.u32 %r5, " + value + ";" + body.replace("{value}", "%r3") + "st.shared.u32 [%r2], %r5;"
        if value == "%laneid":
            assert run(later, threads=128, declarations=SHARED, order=order) is not None
            continue
        with pytest.raises(ptx.EmulatorError, match="race"):
            run(later, threads=128, declarations=SHARED, order=order)
    outsider = body.replace("{value}", "%r3").replace("st.shared", "setp.lt.u32 %p1, %tid, 96; @%p1 st.shared")
    with pytest.raises(ptx.EmulatorError) as caught:
        run(outsider, threads=128, declarations=SHARED, order=order)
    assert (caught.value.kind, caught.value.warp) == ("race", 3)


@pytest.mark.parametrize("order", ["lockstep", "warp"])
def test_named_barriers(order):
    """Warps 0 and 1 produce and only arrive; warps 2 and 3 wait for them."""
    body = """
    mov.u32 %r1, tile; mov.u32 %d0, 0; setp.ge.u32 %p1, %tid, 64; @%p1 bra $CONSUME;
    mad.lo.u32 %r2, %tid, 4, %r1; st.shared.u32 [%r2], %a0; bar.arrive 1, 128; bra.uni $END;
    $CONSUME: bar.sync 1, 128; sub.u32 %r3, %tid, 64; mad.lo.u32 %r2, %r3, 4, %r1; ld.shared.u32 %d0, [%r2];
    $END: mov.u32 %r4, 0;
    """
    values = np.arange(128, dtype=np.uint32) + 5
    got = run(body, [values], threads=128, declarations=SHARED, order=order)
    assert got.tolist() == [0] * 64 + values[:64].tolist()
    late = body.replace("bar.arrive 1, 128;", "").replace(
        "mad.lo.u32 %r2, %tid", "bar.arrive 1, 128; mad.lo.u32 %r2, %tid"
    )
    with pytest.raises(ptx.EmulatorError) as caught:
        run(late, [values], threads=128, declarations=SHARED, order="lockstep", check_uninitialised=False)
    assert caught.value.kind == "race"


def fault(body: str, threads: int = 64, **options) -> ptx.EmulatorError:
    with pytest.raises(ptx.EmulatorError) as caught:
        run(body, threads=threads, **options)
    return caught.value


def test_divergent_barrier():
    inside = "mov.u32 %d0, 0; setp.lt.u32 %p1, %tid, 40; @%p1 bra $A; bra.uni $B; $A: bar.sync 0; $B: mov.u32 %r1, 0;"
    inside += "@!%p1 bra $W; bra.uni $E; $W: bar.sync 0; $E: mov.u32 %r1, 1;"
    for order in ("lockstep", "warp"):
        assert fault(inside, order=order).kind == "divergent_barrier"
    assert fault("mov.u32 %d0, 0; setp.lt.u32 %p1, %tid, 5; @%p1 bar.sync 0;").kind == "divergent_barrier"
    missing = "mov.u32 %d0, 0; setp.lt.u32 %p1, %tid, 32; @%p1 bar.sync 1, 64;"
    error = fault(missing)
    assert error.kind == "divergent_barrier"
    assert error.block == (0, 0, 0)
    assert error.text == "@%p1 bar.sync 1, 64"


def test_different_barriers():
    body = "mov.u32 %d0, 0; setp.lt.u32 %p1, %tid, 32; @%p1 bra $A; bar.sync 0; bra.uni $B; $A: bar.sync 0;"
    body += "$B: mov.u32 %r1, 0;"
    assert fault(body).kind == "divergent_barrier"


def test_shuffle_from_an_absent_lane():
    outside = "setp.lt.u32 %p1, %tid, 16; mov.u32 %d0, 0; @%p1 shfl.sync.bfly.b32 %d0, %tid, 16, 31, 0x0000ffff;"
    error = fault(outside, threads=32)
    assert error.kind == "inactive_lane"
    assert error.lane == 0
    everyone = "setp.lt.u32 %p1, %tid, 16; mov.u32 %d0, 0; @%p1 shfl.sync.bfly.b32 %d0, %tid, 1, 31, 0xffffffff;"
    assert fault(everyone, threads=32).kind == "inactive_lane"
    stranger = "mov.u32 %d0, 0; shfl.sync.bfly.b32 %d0, %tid, 1, 31, 0x0000ffff;"
    assert fault(stranger, threads=32).kind == "inactive_lane"


def test_waiting_for_lanes_that_never_come():
    body = """
    mov.u32 %d0, 0; setp.lt.u32 %p1, %tid, 16; @%p1 bra $A;
    shfl.sync.idx.b32 %d0, %tid, 0, 31, -1; bra.uni $E;
    $A: shfl.sync.idx.b32 %d0, %tid, 1, 31, -1;
    $E: mov.u32 %r1, 0;
    """
    assert fault(body, threads=32).kind == "deadlock"


def test_endless_loop():
    assert fault("mov.u32 %d0, 0; $L: bra.uni $L;", max_instructions=10_000).kind == "limit"


def test_trap():
    assert fault("mov.u32 %d0, 0; setp.eq.u32 %p1, %tid, 33; @%p1 trap;").lane == 1
