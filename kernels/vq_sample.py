"""vq_sample in Triton: the token of the largest logit / temperature + noise; no logit is stored.

    scan    of a block of tokens: the best score, and bounds of the best score + noise, in fp32
    weigh   a filter's threshold, four bits of the float at a time: what the tokens of each digit weigh
    draw    in double precision, the blocks that may hold the winner: one or two of them

The noise of u = 1 - e lies in [log((1 - e) / e), -log e], for e <= -log u <= e / (1 - e). Weights are integers, so that
no order of additions changes a sum.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from scrimp.ops.vq_sample import _check

from .launch import Launch, cdiv
from .tuning import config
from .vq_logits import code_scores, token_logits, tokens_of

PARTS = 256  # blocks whose numbers a program looks at together
SHIFTS = (28, 24, 20, 16, 12, 8, 4, 0, -4)  # of the digits of a threshold, 16 values each; then nothing is left
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def mix(value):
    """The finaliser of splitmix64 on uint64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def noise_bits(seed, position, token):
    """The hash behind the noise, uint64, of int64 numbers: its upper 52 bits are those of the uniform number."""
    key = mix(mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64, bitcast=True) * GAMMA)
    return mix((token + 1).to(tl.uint64) * GAMMA + key)


@triton.jit
def rank_of(score):
    """int64 from 0 to 2^32 - 1 in the order of the fp32 numbers; both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def scores_of(scores, codes, bias, temperature, v, V, K, LEVELS: tl.constexpr):
    """logits / temperature `[BLOCK]` (the logits where it is 0), -inf behind V."""
    logits = token_logits(scores, codes, bias, v, V, K, LEVELS)
    scaled = tl.div_rn(logits, tl.where(temperature == 0.0, 1.0, temperature))
    return tl.where(v < V, scaled, -float("inf"))


@triton.jit
def weight_of(score, best, UNIT: tl.constexpr):
    """exp(score - best) as an integer; 0 where that is no number."""
    below = score.to(tl.float64) - best.to(tl.float64)
    return tl.where(below <= 0.0, tl.exp(below) * (1 << UNIT) + 0.5, 0.0).to(tl.int64)


@triton.jit
def best_of(blocks_best, blocks, PARTS: tl.constexpr):
    """The largest of the blocks' best scores, and whether one of them is NaN."""
    best, bad = tl.full((PARTS,), -float("inf"), tl.float32), tl.zeros((PARTS,), tl.int32)
    for first in range(0, blocks, PARTS):
        at = first + tl.arange(0, PARTS)
        some = tl.load(blocks_best + at, mask=at < blocks, other=-float("inf"))
        best, bad = tl.maximum(best, some), bad | (some != some).to(tl.int32)
    return tl.max(best, 0), tl.max(bad, 0) > 0


@triton.jit
def weights_until(weights, stop):
    """int64 `[16]`: the weights of each digit in the blocks before `stop`."""
    digit, other = tl.arange(0, 16), tl.arange(0, 32)
    total = tl.zeros((32, 16), tl.int64)
    for first in range(0, stop, 32):
        at = weights + (first + other)[:, None] * 16 + digit[None, :]
        total += tl.load(at, mask=(first + other < stop)[:, None], other=0)
    return tl.sum(total, 0)


@triton.jit
def state_at(state, i):
    """One of the four int64 numbers of a state."""
    return tl.sum(tl.where(tl.arange(0, 4) == i, state, 0), 0)


@triton.jit
def kept(score, block, blocks, row, best, log_min_p, cut, equals, FILTER: tl.constexpr, UNIT: tl.constexpr):
    """Whether the filters keep a block's tokens of these scores.

    `cut` `[M, 4]` holds the rank of the threshold, the weight above it and the weight wanted; `equals`
    `[M, blocks, 16]` what tokens weigh by the threshold's last digit: with FILTER 3, no more of those at the
    threshold are kept than it needs, those of the lowest ids.
    """
    rank = rank_of(score)
    keep = rank >= rank_of(best + log_min_p)
    if FILTER > 1:
        state = tl.load(cut + 4 * row + tl.arange(0, 4))
        low = state_at(state, 0)
        keep = keep & (rank >= low)
    if FILTER > 2:
        bits = (low - 2147483648).to(tl.int32)
        each = weight_of((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), best, UNIT)
        missing = state_at(state, 2) - state_at(state, 1)
        before = weights_until(equals + row * blocks * 16, block)
        before = tl.sum(tl.where(tl.arange(0, 16) == (low & 15), before, 0), 0)
        equal = (rank == low).to(tl.int32)
        keep = keep & ((equal == 0) | (before + (tl.cumsum(equal, 0) - 1) * each < missing))
    return keep


@triton.jit(do_not_specialize=["K", "blocks"])
def vq_sample_scan_kernel(
    scores, codes, bias, temperature, seed, position, best_in, cut, equals, best_out, high, low,
    V, K, blocks, log_min_p,
    FILTER: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Of one row and one block of tokens: the best score (NaN if one is), bounds of the best score + noise.

    FILTER 0 knows no filter, 1 min-p alone, 2 a threshold, 3 a threshold whose equals are counted.
    """
    m, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, part = tl.cast(m, tl.int64), tl.program_id(0)
    v = tokens_of(block, BLOCK)
    score = scores_of(scores + row * K, codes, bias, tl.load(temperature + m), v, V, K, LEVELS)
    top = tl.max(score, 0)
    bad = tl.max((score != score).to(tl.int32), 0) > 0
    tl.store(best_out + part, tl.where(bad, float("nan"), top))
    if FILTER > 0:
        best, bad = best_of(best_in + row * blocks, blocks, PARTS)
        keep = kept(score, block, blocks, row, best, log_min_p, cut, equals, FILTER, UNIT)
        score = tl.where(keep, score, -float("inf"))
    rest = (~noise_bits(tl.load(seed + m), tl.load(position + m), v.to(tl.int64))) >> 12
    e = (rest.to(tl.float32) + 0.5) * 2.220446049250313e-16  # 2^-52
    slack = tl.abs(score) * 9.5367431640625e-07 + 6.103515625e-05  # above every rounding of these lines
    above = -tl.log(e)
    below = above + tl.log(1.0 - e)
    there = score > -float("inf")
    tl.store(high + part, tl.max(tl.where(there, score + above + slack, -float("inf")), 0))
    tl.store(low + part, tl.max(tl.where(there, score + below - slack, -float("inf")), 0))


@triton.jit(do_not_specialize=["K", "blocks", "shift", "wanted"])
def vq_sample_weigh_kernel(
    scores, codes, bias, temperature, best, floor, weights_in, state_in, weights_out, state_out,
    V, K, blocks, shift, wanted,
    MASS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One row and one block of tokens: finds the threshold's next digit, then weighs those of the one below it.

    A state is (the threshold's upper bits, the weight above them, the weight wanted, 0). Tokens weigh 1 each, or where
    MASS their probabilities, and below `floor` nothing; `wanted` is a number of tokens, or top_p 2^53.
    """
    m, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = tl.cast(m, tl.int64)
    digit, four = tl.arange(0, 16), tl.arange(0, 4)
    upper = tl.full((), 0, tl.int64)
    above = upper
    target = upper
    if shift < 28:
        weights = weights_until(weights_in + row * blocks * 16, blocks)
        if shift == 24:
            target = tl.full((), 0, tl.int64) + wanted
            if MASS:
                share = target.to(tl.float64) * 1.1102230246251565e-16 * tl.sum(weights, 0).to(tl.float64)  # 2^-53
                target = share.to(tl.int64)
                target += (target.to(tl.float64) < share).to(tl.int64)
        else:
            state = tl.load(state_in + 4 * row + four)
            upper, above, target = state_at(state, 0), state_at(state, 1), state_at(state, 2)
        from_digit = tl.sum(tl.where(digit[None, :] >= digit[:, None], weights[None, :], 0), 1)
        chosen = tl.max(tl.where(above + from_digit >= target, digit, 0), 0)
        upper = upper * 16 + chosen
        above += tl.sum(tl.where(digit > chosen, weights, 0), 0)
        if block == 0:
            state = tl.where(four == 1, above, tl.where(four == 2, target, 0))
            tl.store(state_out + 4 * row + four, tl.where(four == 0, upper, state))
    if shift >= 0:
        v = tokens_of(block, BLOCK)
        score = scores_of(scores + row * K, codes, bias, tl.load(temperature + m), v, V, K, LEVELS)
        rank = rank_of(score)
        weighs = (v < V) & ((rank >> (shift + 4)) == upper)
        if floor is not None:
            weighs = weighs & (rank >= tl.load(floor + 4 * row))
        if MASS:
            highest, _ = best_of(best + row * blocks, blocks, PARTS)
            weight = tl.where(weighs, weight_of(score, highest, UNIT), 0)
        else:
            weight = weighs.to(tl.int64)
        own = (rank >> shift) & 15
        found = tl.zeros((16,), tl.int64)
        for d in range(16):
            found = tl.where(digit == d, tl.sum(tl.where(own == d, weight, 0), 0), found)
        tl.store(weights_out + (row * blocks + block) * 16 + digit, found)


@triton.jit(do_not_specialize=["K", "blocks"])
def vq_sample_draw_kernel(
    scores, codes, bias, temperature, seed, position, best_in, cut, equals, high, low, token,
    V, K, blocks, log_min_p,
    FILTER: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The token of one row, -1 where there is none."""
    m = tl.program_id(0)
    row = tl.cast(m, tl.int64)
    best_in, high, low = best_in + row * blocks, high + row * blocks, low + row * blocks
    heat = tl.load(temperature + m)
    best, bad = best_of(best_in, blocks, PARTS)
    least, _ = best_of(low, blocks, PARTS)
    plain = (heat == 0.0) | (best == float("inf"))
    chosen, drawn = tl.full((), -1, tl.int32), tl.full((), -float("inf"), tl.float64)
    if (bad == 0) & (best > -float("inf")) & (heat >= 0.0) & (heat < float("inf")):
        for first in range(0, blocks, PARTS):
            at = first + tl.arange(0, PARTS)
            ends = tl.load(high + at, mask=at < blocks, other=-float("inf"))
            tops = tl.load(best_in + at, mask=at < blocks, other=-float("inf"))
            wanted = (at < blocks) & tl.where(plain, tops == best, ends >= least)
            block = tl.min(tl.where(wanted, at, 0x7FFFFFFF), 0)
            while block < 0x7FFFFFFF:
                v = tokens_of(block, BLOCK)
                score = scores_of(scores + row * K, codes, bias, heat, v, V, K, LEVELS)
                bits = noise_bits(tl.load(seed + m), tl.load(position + m), v.to(tl.int64)) >> 12
                u = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
                value = score.to(tl.float64) - tl.log(-tl.log(u))
                if FILTER > 0:
                    keep = kept(score, block, blocks, row, best, log_min_p, cut, equals, FILTER, UNIT)
                    value = tl.where(keep, value, -float("inf"))
                value = tl.where(plain, tl.where(score == best, 0.0, -float("inf")), value)
                value = tl.where(v < V, value, -float("inf"))
                top = tl.max(value, 0)
                if top > drawn:
                    drawn = top
                    chosen = tl.min(tl.where(value == top, v, 0x7FFFFFFF), 0)
                block = tl.min(tl.where(wanted & (at > block), at, 0x7FFFFFFF), 0)
    tl.store(token + m, chosen.to(tl.int64))


def launches(
    h: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it."""
    _check(h, codebook, codes, bias, temperature, seed, position, top_k, top_p, min_p)
    token = seed.new_empty(seed.shape)
    M, K, V = token.numel(), codebook.shape[0], codes.shape[-1]
    if M == 0:
        return token, []
    scores, made = code_scores("vq_sample", h, codebook)
    chosen = config("vq_sample", h.device, rows=M, tokens=V)
    blocks = cdiv(V, chosen["BLOCK"])
    head = {"scores": scores, "codes": codes.contiguous(), "bias": None if bias is None else bias.contiguous()}
    heat, seed, position = temperature.contiguous(), seed.contiguous(), position.contiguous()
    sizes = {"V": V, "K": K, "blocks": blocks}
    constants = {
        "LEVELS": codes.shape[0] if codes.dim() == 2 else 1, "BLOCK": chosen["BLOCK"], "PARTS": PARTS,
        "UNIT": min(44, 62 - V.bit_length()),  # bits of a probability's fraction: all V of them have room in an int64
    }  # fmt: skip

    def weigh(wanted: int, best: Tensor, floor: Tensor | None, mass: bool) -> tuple[Tensor, Tensor]:
        """Adds the launches that find a threshold; its state `[M, 4]`, and what weighs how much at it."""
        weights, states = seed.new_empty(2, M, blocks, 16), [seed.new_empty(M, 4) for _ in range(2)]
        for i, shift in enumerate(SHIFTS):
            made.append(
                Launch(
                    vq_sample_weigh_kernel,
                    grid=(M * blocks, 1, 1),
                    args={
                        **head, "temperature": heat, "best": best, "floor": floor,
                        "weights_in": weights[1 - i % 2], "state_in": states[1 - i % 2],
                        "weights_out": weights[i % 2], "state_out": states[i % 2],
                        **sizes, "shift": shift, "wanted": wanted,
                    },
                    constants={"MASS": mass, **constants},
                    num_warps=chosen["num_warps"],
                )
            )  # fmt: skip
        return states[0], weights[1]

    def last(filtered: int, best_in: Tensor, cut: Tensor | None, equals: Tensor | None, **out: Tensor) -> Launch:
        """A scan, or where there is a `token` the draw."""
        kernel, programs, warps = vq_sample_scan_kernel, M * blocks, chosen["num_warps"]
        if "token" in out:
            kernel, programs, warps = vq_sample_draw_kernel, M, chosen["draw_warps"]
        return Launch(
            kernel,
            grid=(programs, 1, 1),
            args={
                **head, "temperature": heat, "seed": seed, "position": position, "best_in": best_in, "cut": cut,
                "equals": equals, **out, **sizes, "log_min_p": math.log(min_p) if min_p > 0 else -math.inf,
            },
            constants={"FILTER": filtered, **constants},
            num_warps=warps,
        )  # fmt: skip

    best, again, high, low = (heat.new_empty(M, blocks) for _ in range(4))
    made.append(last(0, best, None, None, best_out=best, high=high, low=low))
    cut = equals = None
    if 0 < top_k < V:
        cut, _ = weigh(top_k, best, None, mass=False)
    if top_p < 1:
        cut, equals = weigh(int(top_p * 2**53), best, cut, mass=True)
    filtered = 3 if equals is not None else 2 if cut is not None else 1 if min_p > 0 else 0
    if filtered:
        made.append(last(filtered, best, cut, equals, best_out=again, high=high, low=low))
    made.append(last(filtered, best, cut, equals, high=high, low=low, token=token))
    return token, made
