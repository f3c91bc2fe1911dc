"""vq_logits in Triton: the codes' scores by the kernels of `linear`, then one program gives a block of tokens theirs.

The write of V logits a row is what takes time; the scores of a row are few and stay in the cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrimp.ops._vq import check_head

from .launch import Launch, cdiv
from .linear import launches as linear_launches
from .tuning import config


@triton.jit
def tokens_of(block, BLOCK: tl.constexpr):
    """The block's tokens; four neighbours to a thread: 16 bytes of codes, of which a warp loads whole lines."""
    return tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK), [4])


@triton.jit
def token_logits(scores, codes, bias, v, V, K, LEVELS: tl.constexpr):
    """fp32 logits `[BLOCK]` of tokens `v`, rounded to the dtype of `scores`; NaN where a code is no row, and behind V.

    `scores` are those of one row's codes `[K]`; codes `[LEVELS, V]`; bias `[V]`, or None.
    """
    total = tl.zeros(v.shape, tl.float32)
    for level in tl.static_range(LEVELS):
        code = tl.load(codes + tl.cast(level, tl.int64) * V + v, mask=v < V, other=-1)
        total += tl.load(scores + code, mask=(code >= 0) & (code < K), other=float("nan")).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
    return total.to(scores.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["M", "K", "rows"])
def vq_logits_kernel(
    scores, codes, bias, out, M, V, K, rows, LEVELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [M, V] of a block of tokens and `rows` rows: scores [M, K], codes [LEVELS, V]."""
    v = tokens_of(tl.program_id(0), BLOCK)
    first = tl.program_id(1) * rows
    for m in range(first, tl.minimum(first + rows, M)):
        row = tl.cast(m, tl.int64)
        logits = token_logits(scores + row * K, codes, bias, v, V, K, LEVELS)
        tl.store(out + row * V + v, logits.to(out.dtype.element_ty), mask=v < V)


def code_scores(op: str, h: Tensor, codebook: Tensor) -> tuple[Tensor, list[Launch]]:
    """h codebook^T `[M, K]` by the op `linear`, still unwritten, and what writes it."""
    if h.dtype == torch.float64:
        raise ValueError(f"{op}: h is float64; on a GPU it must be float32, bfloat16 or float16")
    scores, made = linear_launches(h, [codebook], [], None)
    return scores.view(math.prod(h.shape[:-1]), codebook.shape[0]), made


def launches(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it."""
    check_head("vq_logits", h, codebook, codes, bias)
    M, (K, V) = math.prod(h.shape[:-1]), (codebook.shape[0], codes.shape[-1])
    out = h.new_empty(*h.shape[:-1], V)
    if 0 in (M, V):
        return out, []
    scores, made = code_scores("vq_logits", h, codebook)
    chosen = config("vq_logits", h.device, rows=M, tokens=V)
    rows = chosen["ROWS"]
    launch = Launch(
        vq_logits_kernel,
        grid=(cdiv(V, chosen["BLOCK"]), cdiv(M, rows), 1),
        args={
            "scores": scores, "codes": codes.contiguous(), "bias": None if bias is None else bias.contiguous(),
            "out": out, "M": M, "V": V, "K": K, "rows": rows,
        },
        constants={"LEVELS": codes.shape[0] if codes.dim() == 2 else 1, "BLOCK": chosen["BLOCK"]},
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out, [*made, launch]
