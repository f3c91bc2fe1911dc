"""tree_attention: new rows attend to a cached prefix and to their ancestors among themselves."""

import torch
from torch import Tensor

from .._registry import register
from ._check import check_attention, check_dtype, rows_of_16_bytes

SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix, Tensor? ancestors, int window, float scale)"
    " -> (Tensor, Tensor)"
)
OP = "tree_attention"
MAX_ROWS = 64  # new rows of a sequence: bits of an ancestor word


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None,
    window: int,
    scale: float,
) -> None:
    beside = {"prefix": prefix} if ancestors is None else {"prefix": prefix, "ancestors": ancestors}
    check_attention(OP, q, {"k": k_cache, "v": v_cache}, beside, scale)
    B, _, T, _ = q.shape
    if T > MAX_ROWS:
        raise ValueError(f"{OP}: T={T} new rows are more than {MAX_ROWS}")
    check_dtype(OP, "prefix", prefix, (torch.int32,))
    if prefix.shape != (B,):
        raise ValueError(f"{OP}: prefix has shape {list(prefix.shape)}, expected [{B}]")
    if window < 0:
        raise ValueError(f"{OP}: window={window} must not be negative")
    if ancestors is None:
        return
    check_dtype(OP, "ancestors", ancestors, (torch.int64,))
    if ancestors.dim() != 2 or ancestors.shape[0] not in (1, B) or ancestors.shape[1] != T:
        raise ValueError(f"{OP}: ancestors has shape {list(ancestors.shape)}, expected [1 or {B}, {T}]")
    if window:
        raise ValueError(f"{OP}: window={window} goes with the chain only, not with ancestors")


def _check_values(prefix: Tensor, ancestors: Tensor | None, T: int, capacity: int) -> None:
    for b, tokens in enumerate(prefix.tolist()):
        if not 0 <= tokens <= capacity - T:
            raise ValueError(f"{OP}: prefix[{b}]={tokens} and {T} new rows leave the cache's {capacity} slots")
    if ancestors is not None and T < MAX_ROWS and bool((ancestors >> T).any()):
        raise ValueError(f"{OP}: ancestors has bits set beyond its T={T} new rows")


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(q, k_cache, v_cache, prefix, ancestors, window, scale)
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(q, k_cache, v_cache, prefix, ancestors, window, scale)
    (B, H, T, _), G = q.shape, k_cache.shape[1]
    _check_values(prefix, ancestors, T, k_cache.shape[2])
    slot, row = (torch.arange(n, device=q.device) for n in (k_cache.shape[2], T))
    tail = slot - prefix.long().view(B, 1, 1)  # [B, 1, C]: which new row a slot holds; negative in the prefix
    if ancestors is None:
        seen = tail <= row.view(T, 1)
    else:
        seen = (tail < 0) | ((tail < T) & ((ancestors.unsqueeze(2) >> tail.clamp(0, 63)) & 1).bool())
    if window:
        seen = seen & (tail > row.view(T, 1) - window)
    repeats = H // G if G else 1
    k, v = k_cache.repeat_interleave(repeats, 1), v_cache.repeat_interleave(repeats, 1)
    v = v.masked_fill(~seen.any(1)[:, None, :, None], 0)  # slots nobody sees may hold anything
    scores = (scale * (q @ k.transpose(2, 3))).masked_fill(~seen.unsqueeze(1), -torch.inf)
    precise = scores.to(torch.promote_types(q.dtype, torch.float32))
    lse = precise.logsumexp(3)
    weights = torch.exp(precise - lse.unsqueeze(3)).masked_fill(~seen.unsqueeze(1), 0)
    out = weights.to(q.dtype) @ v
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _cuda_takes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None,
    window: int,
    scale: float,
) -> bool:
    """Heads of 64 or 128 numbers in 16 bits, rows at multiples of 16 bytes, no window; and what is to be refused."""
    tensors = (q, k_cache, v_cache)
    if any(x.dim() != 4 for x in tensors):
        return True
    served = q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in (64, 128) and window == 0
    return served and rows_of_16_bytes(*tensors)


_call = register(OP, SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of T new rows over a cached prefix and over their ancestors among the new rows.

    out_t = sum_j softmax_j(scale q_t . k_j) v_j over j seen by t;  lse_t = log sum_j exp(scale q_t . k_j)

    Row t sees all keys [0, prefix[b]) and key prefix[b] + j where bit j of its ancestor word is set (its own bit
    among them). Keys are added up in the order of the path: a row's bits are those of decoding its path alone, token by
    token, whatever the other rows, sequences and threads.

    Args:
        q: `[B, H, T, D]` fp32 or bf16, T at most 64, D at most 256; any strides.
        k_cache: `[B, G, C, D]`, dtype of `q`; H is a multiple of G and query head h reads head h // (H / G). Row t's
            own key lies in slot prefix[b] + t.
        v_cache: like `k_cache`.
        prefix: int32 `[B]`, tokens that every row of a sequence sees.
        ancestors: int64 `[1 or B, T]`, or None for the chain: row t sees new rows j <= t.
        window: above 0, row t of the chain sees only the last `window` keys, its own among them.
        scale: factor of the scores; 1 / sqrt(D) unless given.

    Returns:
        out `[B, H, T, D]` in the dtype of `q` (memory order B, T, H, D), lse `[B, H, T]` fp32. Rows that see no key
        give 0 and -inf.

    Raises:
        ValueError: a shape, device, dtype or scale that does not fit, with the value.
        RuntimeError: a prefix or ancestor bits out of range (ValueError by the reference). Kernels of a GPU clamp both.

    Source: tree attention of SpecInfer (2305.09781) and Medusa (2401.10774); splits as in Flash-Decoding.

    >>> import torch, scrimp
    >>> q, cache, prefix = torch.randn(1, 4, 3, 64), torch.randn(1, 2, 100, 64), torch.tensor([90], dtype=torch.int32)
    >>> siblings = torch.tensor([[0b001, 0b011, 0b101]])  # two children of the first row
    >>> out, lse = scrimp.ops.tree_attention(q, cache, cache, prefix, siblings)
    >>> tuple(out.shape), tuple(lse.shape)
    ((1, 4, 3, 64), (1, 4, 3))
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    try:
        return _call(q, k_cache, v_cache, prefix, ancestors, window, scale)
    except RuntimeError:
        _check(
            q, k_cache, v_cache, prefix, ancestors, window, scale
        )  # names what does not fit; on every call it would cost more than the op
        raise
