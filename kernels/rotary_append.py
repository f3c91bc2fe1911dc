"""rotary_append in Triton: one program moves HEADS heads of one token, of q, of k or of v.

Slots and positions are known on the device alone: a token whose slot lies outside the cache is not written to it, and
a position outside the tables is taken for the nearest one inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config


@triton.jit
def move_heads(
    source, source_h, to, to_h, first, heads, cos, sin,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads from `first` on of one token: R dimensions rotated, the others copied. Pointers are those of head 0."""
    h = first + tl.arange(0, HEADS)
    inside = (h < heads)[:, None]
    source += h.to(tl.int64)[:, None] * source_h
    to += h.to(tl.int64)[:, None] * to_h
    if R > 0:
        i = tl.arange(0, HALF)[None, :]
        angle = i < R // 2
        here = inside & angle
        a = tl.load(source + i, mask=here, other=0.0).to(tl.float32)
        b = tl.load(source + R // 2 + i, mask=here, other=0.0).to(tl.float32)
        cos_a, cos_b = tl.load(cos + i, mask=angle, other=0.0), tl.load(cos + R // 2 + i, mask=angle, other=0.0)
        sin_a, sin_b = tl.load(sin + i, mask=angle, other=0.0), tl.load(sin + R // 2 + i, mask=angle, other=0.0)
        tl.store(to + i, tl.fma(a, cos_a, -(b * sin_a)).to(to.dtype.element_ty), mask=here)
        tl.store(to + R // 2 + i, tl.fma(b, cos_b, a * sin_b).to(to.dtype.element_ty), mask=here)
    if R < D:
        i = R + tl.arange(0, REST)[None, :]
        here = inside & (i < D)
        tl.store(to + i, tl.load(source + i, mask=here), mask=here)


@triton.jit(do_not_specialize=["T", "H", "G", "capacity", "P", "positions_b", "positions_t", "start_b"])
def rotary_append_kernel(
    q, k, v, cos, sin, positions, start, out, k_cache, v_cache,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, cos_p, sin_p, positions_b, positions_t, start_b,
    out_b, out_h, out_t, k_cache_b, k_cache_h, k_cache_t, v_cache_b, v_cache_h, v_cache_t,
    T, H, G, capacity, P,
    D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    q_blocks, kv_blocks = tl.cdiv(H, HEADS), tl.cdiv(G, HEADS)
    blocks = q_blocks + 2 * kv_blocks
    token, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    slot = tl.load(start + b * start_b).to(tl.int64) + t
    if (block >= q_blocks) & ((slot < 0) | (slot >= capacity)):
        return
    if block < q_blocks + kv_blocks:
        position = tl.load(positions + b * positions_b + t * positions_t)
        position = tl.minimum(tl.maximum(position, 0), P - 1).to(tl.int64)
        cos += position * cos_p
        sin += position * sin_p
        if block < q_blocks:
            move_heads(
                q + b * q_b + t * q_t, q_h, out + b * out_b + t * out_t, out_h, block * HEADS, H,
                cos, sin, D, R, HALF, REST, HEADS,
            )  # fmt: skip
        else:
            move_heads(
                k + b * k_b + t * k_t, k_h, k_cache + b * k_cache_b + slot * k_cache_t, k_cache_h,
                (block - q_blocks) * HEADS, G, cos, sin, D, R, HALF, REST, HEADS,
            )  # fmt: skip
    else:
        move_heads(
            v + b * v_b + t * v_t, v_h, v_cache + b * v_cache_b + slot * v_cache_t, v_cache_h,
            (block - q_blocks - kv_blocks) * HEADS, G, cos, sin, D, 0, HALF, WHOLE, HEADS,
        )  # fmt: skip


def launches(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, start: Tensor,
    k_cache: Tensor, v_cache: Tensor,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """The rotated queries, still unwritten, and what writes them and the caches."""
    if q.dtype == torch.float64:
        raise ValueError("rotary_append: q is float64; on a GPU it must be float32, bfloat16 or float16")
    check_cache("k_cache", k_cache)
    check_cache("v_cache", v_cache)
    (B, T, H, D), G, R = q.shape, k.shape[2], cos.shape[1]
    out = q.new_empty(B, H, T, D)
    if 0 in (B, T, D):
        return out, []
    if cos.shape[0] == 0:  # every position is outside
        cos = sin = cos.new_zeros(1, R)
    q, k, v, cos, sin = (unit_last_stride(x) for x in (q, k, v, cos, sin))
    chosen = config("rotary_append", q.device, tokens=B * T, head_dim=D)
    axes = {
        "q": (q, "bth"), "k": (k, "bth"), "v": (v, "bth"), "cos": (cos, "p"), "sin": (sin, "p"),
        "positions": (positions, "bt"), "start": (start, "b"), "out": (out, "bht"),
        "k_cache": (k_cache, "bht"), "v_cache": (v_cache, "bht"),
    }  # fmt: skip
    strides = {
        f"{name}_{axis}": x.stride(i) if x.shape[i] > 1 else 0
        for name, (x, letters) in axes.items()
        for i, axis in enumerate(letters)
    }
    heads = chosen["HEADS"]
    launch = Launch(
        rotary_append_kernel,
        grid=(B * T * (cdiv(H, heads) + 2 * cdiv(G, heads)), 1, 1),
        args={name: x for name, (x, _) in axes.items()}
        | strides
        | {"T": T, "H": H, "G": G, "capacity": k_cache.shape[2], "P": cos.shape[0]},
        constants={
            "D": D, "R": R, "HALF": power_of_two(R // 2), "REST": power_of_two(D - R), "HEADS": heads,
            "WHOLE": power_of_two(D),
        },
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out, [launch]


def check_cache(name: str, cache: Tensor) -> None:
    """Raises ValueError unless every element of a tensor that is written has a place of its own."""
    for i, (size, stride) in enumerate(zip(cache.shape, cache.stride(), strict=True)):
        if size > 1 and (stride != 1 if i == 3 else stride == 0):
            raise ValueError(
                f"rotary_append: {name} must have a contiguous last dimension and no expanded one, got stride "
                f"{stride} in dimension {i}"
            )
