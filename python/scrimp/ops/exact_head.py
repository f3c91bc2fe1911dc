"""exact_head: the k largest logits of a large head, found by a screen of few bits and computed exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._registry import register
from ..head_screen import GROUP, TILE, HeadScreen, tile_bytes
from ._check import before_sm_90, check_dtype, check_same

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor codes, Tensor scales, Tensor? basis, Tensor error, Tensor norm, float slack, "
    "int wide, int k) -> (Tensor, Tensor, Tensor)"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST = 64  # of k


def _check(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    error: Tensor,
    norm: Tensor,
    slack: float,
    wide: int,
    k: int,
) -> None:
    op = "exact_head"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [.., K], got a scalar")
    check_dtype(op, "x", x, DTYPES)
    K = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != K:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [V, {K}] for x {list(x.shape)}")
    if K > 1 and weight.stride(1) != 1:
        raise ValueError(f"{op}: weight has strides {weight.stride()}; the elements of a row must be adjacent")
    V, G = weight.shape[0], -(-K // GROUP)
    if not 1 <= k <= min(MOST, V):
        raise ValueError(f"{op}: k={k} must be from 1 to {MOST} and at most the {V} rows of the head")
    if not 0 <= wide <= G:
        raise ValueError(f"{op}: wide={wide} must be from 0 to {G}, the groups of {K} inputs")
    if not (math.isfinite(slack) and slack >= 0):
        raise ValueError(f"{op}: slack={slack} must be finite and not negative")
    tiles = -(-V // TILE)
    expected = {"codes": (tiles, tile_bytes(G, wide)), "scales": (TILE * tiles,), "error": (G,), "norm": (G,)}
    given = {"codes": codes, "scales": scales, "error": error, "norm": norm}
    if basis is not None:
        expected["basis"], given["basis"] = (GROUP * G, K), basis
    for name, tensor in given.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected[name])} for a head "
                f"[{V}, {K}] with {wide} wide groups"
            )
        check_dtype(op, name, tensor, (torch.uint8 if name == "codes" else torch.float32,))
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; it must be contiguous")
    check_same(op, "dtype", x=x.dtype, weight=weight.dtype)
    check_same(op, "device", x=x.device, weight=weight.device, **{name: t.device for name, t in given.items()})


def _fake(x: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, *rest)  # type: ignore[arg-type]
    lead, k = x.shape[:-1], int(rest[-1])  # type: ignore[call-overload]
    return x.new_empty(*lead, k), x.new_empty(*lead, k, dtype=torch.int64), x.new_empty(lead, dtype=torch.int32)


def reference(x: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """The dense head and a stable sort: every row is computed."""
    _check(x, weight, *rest)  # type: ignore[arg-type]
    values, ids = (x @ weight.T).sort(dim=-1, descending=True, stable=True)
    k = int(rest[-1])  # type: ignore[call-overload]
    scored = torch.full(x.shape[:-1], weight.shape[0], dtype=torch.int32, device=x.device)
    return values[..., :k].contiguous(), ids[..., :k].contiguous(), scored


def _cuda_takes(x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, *_: object) -> bool:
    """Whether CUDA C++ does a call: numbers in 16 bits, rows of whole vectors of 16 bytes, tensor cores of sm_8x.

    From sm_90 on `linear` in Triton multiplies by other instructions, whose bits only `exact_head` in Triton gives.
    """
    whole = x.shape[-1:] > (0,) and x.shape[-1] % 8 == 0 and weight.dim() == 2 and weight.stride(0) % 8 == 0
    near = whole and all(tensor.data_ptr() % 16 == 0 for tensor in (weight, codes, scales))
    return near and before_sm_90(x) and x.dtype in (torch.float16, torch.bfloat16)


_call = register("exact_head", SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def exact_head(x: Tensor, weight: Tensor, screen: HeadScreen, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits of each hidden state: to the bit those of the dense head, for a fraction of its bytes.

    values, ids = top-k of linear(x, weight); of equal logits the lower id comes first, NaN counts as the largest

    The screen gives every row v of the head an interval that contains its logit: s_v (c_v - B) to s_v (c_v + B), with
    c_v from integers of few bits and B, one number of the hidden state, above all errors, those of rounding among them.
    A first exact guess gives a threshold that k logits reach; rows whose interval ends below it cannot be among the
    largest, all others are computed as `scrimp.ops.linear` computes them. Where more than a quarter of the rows (and
    256) would remain, or a number is not finite, the hidden state is computed densely: never wrong, only slow, and
    `scored` shows it. A GPU computes just the rows that remain, however many: all, where a number is not finite.

    A hidden state's result does not depend on the others or on the number of threads. It has the bits of `linear`
    for up to 64 hidden states.

    Args:
        x: hidden states `[.., K]` fp32 or bf16.
        weight: the head `[V, K]`, dtype of `x`; elements of a row adjacent.
        screen: of this weight, `scrimp.HeadScreen.build(weight)`.
        k: logits wanted, 1 to 64 and at most V.

    Returns:
        values `[.., k]` in the dtype of `x`, descending; ids `[.., k]` int64; scored `[..]` int32: rows that were
        computed exactly, V for a hidden state that fell back.

    Raises:
        ValueError: a shape, dtype, device or k that does not fit, with the value.

    Source: a screen and exact re-ranking as in SVD-softmax (Shim et al. 2017), with the interval of the quantisation
        residual by Cauchy and Schwarz in place of a fixed number of candidates.

    >>> import torch, scrimp
    >>> weight = torch.randn(1000, 64)
    >>> values, ids, scored = scrimp.ops.exact_head(weight[[3, 7]], weight, scrimp.HeadScreen.build(weight), k=2)
    >>> ids[:, 0].tolist()
    [3, 7]
    """
    if weight.dim() != 2 or weight.shape[0] != screen.rows:
        raise ValueError(f"exact_head: weight has shape {list(weight.shape)}, but the screen is of {screen.rows} rows")
    args = (x, weight, *screen.tensors().values(), screen.slack, screen.wide, k)
    _check(*args)  # type: ignore[arg-type]
    found: tuple[Tensor, Tensor, Tensor] = _call(*args)
    return found
