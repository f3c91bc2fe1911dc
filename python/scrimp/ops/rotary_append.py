"""rotary_append: rotates the queries and keys of new tokens and appends keys and values to the cache."""

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, check_dtype, check_same

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor start, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache) -> Tensor"
)
OP = "rotary_append"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    start: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"{OP}: q and k must be [B, T, heads, D], got shapes {list(q.shape)} and {list(k.shape)}")
    (B, T, H, D), G = q.shape, k.shape[2]
    check_dtype(OP, "q", q, FLOATS)
    check_same(OP, "dtype", q=q.dtype, k=k.dtype, v=v.dtype, k_cache=k_cache.dtype, v_cache=v_cache.dtype)
    check_dtype(OP, "cos", cos, (torch.promote_types(q.dtype, torch.float32),))
    check_same(OP, "dtype", cos=cos.dtype, sin=sin.dtype)
    check_dtype(OP, "positions", positions, (torch.int32,))
    check_dtype(OP, "start", start, (torch.int32,))
    check_same(OP, "device", **{name: value.device for name, value in locals().items() if isinstance(value, Tensor)})
    check_same(OP, "shape", expected=(B, T, G, D), k=tuple(k.shape), v=tuple(v.shape))
    check_same(OP, "shape", expected=(B, T), positions=tuple(positions.shape))
    check_same(OP, "shape", expected=(B,), start=tuple(start.shape))
    check_same(OP, "shape", k_cache=tuple(k_cache.shape), v_cache=tuple(v_cache.shape))
    if k_cache.dim() != 4 or (k_cache.shape[0], k_cache.shape[1], k_cache.shape[3]) != (B, G, D):
        raise ValueError(f"{OP}: k_cache has shape {list(k_cache.shape)}, expected [{B}, {G}, capacity, {D}]")
    check_same(OP, "shape", cos=tuple(cos.shape), sin=tuple(sin.shape))
    if cos.dim() != 2 or cos.shape[1] % 2 or cos.shape[1] > D:
        raise ValueError(f"{OP}: cos has shape {list(cos.shape)}, expected [positions, even number up to D={D}]")


def _check_values(positions: Tensor, start: Tensor, count: int, capacity: int) -> None:
    """Raises before anything is written."""
    if positions.numel() and not 0 <= (bad := int(positions.min())) <= (bad := int(positions.max())) < count:
        raise ValueError(f"{OP}: position {bad} is outside the {count} rows of cos and sin")
    T = positions.shape[1]
    for b, first in enumerate(start.tolist()):
        if not 0 <= first <= capacity - T:
            raise ValueError(f"{OP}: start[{b}]={first} and {T} new rows leave the cache's {capacity} slots")


def _fake(q: Tensor, *args: Tensor) -> Tensor:
    _check(q, *args)
    B, T, H, D = q.shape
    return q.new_empty(B, H, T, D)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, T, heads, D]` with cos and sin `[B, T, R]`, transposed to `[B, heads, T, D]`."""
    R = cos.shape[-1]
    turned, kept = x[..., :R], x[..., R:]
    half = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
    turned = (turned * cos.unsqueeze(2) + half * sin.unsqueeze(2)).to(x.dtype)
    return torch.cat((turned, kept), -1).transpose(1, 2)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    start: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    _check(q, k, v, cos, sin, positions, start, k_cache, v_cache)
    _check_values(positions, start, cos.shape[0], k_cache.shape[2])
    cos, sin = cos[positions.long()], sin[positions.long()]
    new_k, new_v = _rotate(k, cos, sin), v.transpose(1, 2)
    for b, first in enumerate(start.tolist()):
        k_cache[b, :, first : first + q.shape[1]] = new_k[b]
        v_cache[b, :, first : first + q.shape[1]] = new_v[b]
    return _rotate(q, cos, sin).contiguous()


_call = register("rotary_append", SCHEMA, fake=_fake, reference=reference)


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    start: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Rotates new queries and keys by their positions; writes the keys and the values to the cache.

    y = x cos[p] + rotate_half(x) sin[p] on the first R of D dimensions, rotate_half((a, b)) = (-b, a) for halves a, b;
    computed in fp32 and rounded once.

    Args:
        q: `[B, T, H, D]` fp32, bf16 or (on GPUs) fp16; any strides, such as a view of one linear's output.
        k: `[B, T, G, D]`, dtype of `q`; any strides.
        v: like `k`.
        cos: `[P, R]` fp32, R even and at most D.
        sin: like `cos`.
        positions: int32 `[B, T]`, the row of `cos` and `sin` of each token (which a tree's siblings share).
        start: int32 `[B]`, the slot of each sequence's first new token.
        k_cache: `[B, G, C, D]`, dtype of `q`, last dimension contiguous; slots start[b] + t are written.
        v_cache: like `k_cache`.

    Returns:
        The rotated queries, `[B, H, T, D]`.

    Raises:
        ValueError: a shape, device or dtype that does not fit, with the value.
        RuntimeError: slots or positions out of range (ValueError by the reference); nothing has been written then.

    A GPU does not wait for the host to look at values: there a token whose slot is out of range is not written to the
    cache, and a position out of range is taken for the nearest row of `cos` and `sin`.

    Source: Su et al. (2104.09864), halves as in transformers' apply_rotary_pos_emb.

    >>> import torch, scrimp
    >>> x, angle, cache = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.full((1, 2), 0.5), torch.zeros(1, 1, 4, 2)
    >>> zero, two = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 2, dtype=torch.int32)
    >>> q = scrimp.ops.rotary_append(x, x, x, angle.cos(), angle.sin(), zero, two, cache, cache.clone())
    >>> cache[0, 0, 2]
    tensor([0.8776, 0.4794])
    """
    try:
        return _call(q, k, v, cos, sin, positions, start, k_cache, v_cache)
    except RuntimeError:
        _check(
            q, k, v, cos, sin, positions, start, k_cache, v_cache
        )  # names what does not fit; on every call it would cost more than the op
        raise
