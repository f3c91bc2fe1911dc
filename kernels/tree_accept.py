"""tree_accept in Triton: every chunk of every row of a tree chooses at once, then one program a sequence walks.

Rows off the walk cost bandwidth but no time of their own; of the vocabulary only one choice a chunk is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

_LAST = tl.constexpr(0x7FFFFFFF)
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)  # the step of splitmix64


@triton.jit
def mix(value):
    """The finaliser of splitmix64, of uint64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def noise_key(seed, position):
    """The hash of a seed and a position, int64 both, as in `scrimp.ops._noise`."""
    return mix(mix(seed.to(tl.uint64)) + position.to(tl.uint64) * _GAMMA)


@triton.jit
def noise_bits(key, token):
    """52 hashed bits of each token, int32."""
    return mix(key + (token.to(tl.uint64) + 1) * _GAMMA) >> 12


@triton.jit
def gumbel(bits):
    """-log(-log((bits + 1/2) / 2^52)), float64; the logarithm is the device's."""
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16))


@triton.jit
def first_best(value, token):
    """The largest value and the least token that has it; NaN and no token where a value is NaN."""
    wild = tl.max((value != value).to(tl.int32), 0) > 0
    best = tl.max(tl.where(value != value, float("-inf"), value), 0)
    found = tl.min(tl.where(value == best, token, _LAST), 0)
    return tl.where(wild, float("nan"), best), found


@triton.jit(do_not_specialize=["T", "span", "chunks"])
def tree_accept_choose_kernel(
    logits, parents, temperature, seed, position, value, token,
    logits_b, logits_t, parents_b, parents_t, temperature_b, seed_b, position_b, T, V, span, chunks,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """value and token [B, T, chunks] of the best logit / temperature + noise of each chunk of the tree's rows."""
    b, t = tl.program_id(2).to(tl.int64), tl.program_id(1)
    parents += b * parents_b
    depth, row = 0, t
    while row > 0:
        above = tl.load(parents + row.to(tl.int64) * parents_t)
        depth += 1
        row = tl.where(above < row, above, -1)
    if row == 0:
        heat = tl.load(temperature + b * temperature_b)
        key = noise_key(tl.load(seed + b * seed_b), tl.load(position + b * position_b) + depth)
        logits += b * logits_b + t.to(tl.int64) * logits_t
        best = tl.full((BLOCK_V,), float("-inf"), tl.float64)
        found = tl.zeros((BLOCK_V,), tl.int32)
        first = tl.program_id(0) * span
        for begin in range(first, tl.minimum(first + span, V), BLOCK_V):
            v = begin + tl.arange(0, BLOCK_V)
            x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
            score = x.to(tl.float64)
            if heat > 0:
                score = tl.div_rn(x, heat).to(tl.float64) + gumbel(noise_bits(key, v))
            better = (score > best) | (score != score)
            best, found = tl.where(better, score, best), tl.where(better, v, found)
        best, found = first_best(best, found)
        at = (b * T + t) * chunks + tl.program_id(0)
        tl.store(value + at, best)
        tl.store(token + at, found)


@triton.jit(do_not_specialize=["T", "chunks"])
def tree_accept_walk_kernel(
    tokens, parents, value, token, path, chosen, tokens_b, tokens_t, parents_b, parents_t, T, chunks,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """path and chosen [T] of one sequence."""
    b = tl.program_id(0).to(tl.int64)
    tokens += b * tokens_b
    parents += b * parents_b
    path += b * T
    chosen += b * T
    node, depth = 0, 0
    while node < T:
        c = tl.arange(0, BLOCK_C)
        at = (b * T + node) * chunks + c
        best, found = first_best(
            tl.load(value + at, mask=c < chunks, other=float("-inf")), tl.load(token + at, mask=c < chunks, other=0)
        )
        found = tl.where(best > float("-inf"), found, -1).to(tl.int64)
        tl.store(path + depth, node)
        tl.store(chosen + depth, found)
        depth += 1
        child, begin = T, node // BLOCK_T * BLOCK_T  # whole sectors
        while begin < child:
            t = begin + tl.arange(0, BLOCK_T)
            above = tl.load(parents + t.to(tl.int64) * parents_t, mask=t < T, other=-1)
            held = tl.load(tokens + t.to(tl.int64) * tokens_t, mask=t < T, other=-1)
            child = tl.minimum(child, tl.min(tl.where((t > node) & (above == node) & (held == found), t, T), 0))
            begin += BLOCK_T
        node = child
    while depth < T:
        t = depth + tl.arange(0, BLOCK_T)
        tl.store(path + t, -1, mask=t < T)
        tl.store(chosen + t, -1, mask=t < T)
        depth += BLOCK_T


def launches(
    logits: Tensor, tokens: Tensor, parents: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them.

    Rows whose parent is no earlier row are no part of the tree; a temperature that is not positive is 0.
    """
    if logits.element_size() > 4:
        raise ValueError(f"tree_accept: logits is {logits.dtype}; on a GPU it must be float32, bfloat16 or float16")
    B, T, V = logits.shape
    results = parents.new_empty(B, T), tokens.new_empty(B, T)
    if 0 in (B, T):
        return results, []
    if V >= 2**31 - 2**16:  # of the last span, numbers past the last token
        raise ValueError(f"tree_accept: logits of {V} tokens; on a GPU there must be fewer than {2**31 - 2**16}")
    logits = unit_last_stride(logits)
    chosen = config("tree_accept", logits.device, rows=B * T)
    chunks = cdiv(V, chosen["SPAN"])
    best = {
        "value": logits.new_empty(B, T, chunks, dtype=torch.float64),
        "token": parents.new_empty(B, T, chunks),
    }
    inputs = {"parents": parents, "temperature": temperature, "seed": seed, "position": position}
    tree = {"parents_b": parents.stride(0), "parents_t": parents.stride(1)}
    choose = Launch(
        tree_accept_choose_kernel,
        grid=(chunks, T, B),
        args={
            "logits": logits, **inputs, **best, "logits_b": logits.stride(0), "logits_t": logits.stride(1), **tree,
            "temperature_b": temperature.stride(0), "seed_b": seed.stride(0), "position_b": position.stride(0),
            "T": T, "V": V, "span": chosen["SPAN"], "chunks": chunks,
        },
        constants={"BLOCK_V": chosen["BLOCK_V"]},
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    walk = Launch(
        tree_accept_walk_kernel,
        grid=(B, 1, 1),
        args={
            "tokens": tokens,
            "parents": parents,
            **best,
            "path": results[0],
            "chosen": results[1],
            "tokens_b": tokens.stride(0),
            "tokens_t": tokens.stride(1),
            **tree,
            "T": T,
            "chunks": chunks,
        },
        constants={"BLOCK_C": power_of_two(chunks, 32), "BLOCK_T": 64},
        num_warps=1,
    )
    return results, [choose, walk]
