"""merge_attention: two partial attention results over disjoint keys become one."""

import torch
from torch import Tensor

from .._registry import register
from ._check import check_dtype, check_same

SCHEMA = "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    op = "merge_attention"
    if out_a.dim() != 4:
        raise ValueError(f"{op}: out_a must be [B, H, N, D], got shape {list(out_a.shape)}")
    check_dtype(op, "out_a", out_a, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    check_same(op, "dtype", out_a=out_a.dtype, out_b=out_b.dtype)
    check_same(op, "device", out_a=out_a.device, lse_a=lse_a.device, out_b=out_b.device, lse_b=lse_b.device)
    check_same(op, "shape", out_a=tuple(out_a.shape), out_b=tuple(out_b.shape))
    check_same(
        op,
        "shape",
        out_a_rows=tuple(out_a.shape[:3]),
        lse_a=tuple(lse_a.shape),
        lse_b=tuple(lse_b.shape),
    )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(op, name, lse, (torch.float64 if out_a.dtype == torch.float64 else torch.float32,))


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _check(out_a, lse_a, out_b, lse_b)
    B, H, N, D = out_a.shape
    return out_a.new_empty(B, N, H, D).transpose(1, 2), lse_a.new_empty(B, H, N)


def reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _check(out_a, lse_a, out_b, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == -torch.inf
    weight_a = torch.exp(lse_a - lse).masked_fill(empty, 0).unsqueeze(-1)
    weight_b = torch.exp(lse_b - lse).masked_fill(empty, 0).unsqueeze(-1)
    out = (weight_a * out_a + weight_b * out_b).to(out_a.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


_call = register("merge_attention", SCHEMA, fake=_fake, reference=reference)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the attention of the same queries over two disjoint sets of keys, as if over their union.

    lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Args:
        out_a: `[B, H, N, D]` fp32, bf16 or fp16; any strides.
        lse_a: `[B, H, N]` fp32, natural-log sum of exponentials of the scaled scores; -inf for rows without keys.
        out_b: like `out_a`.
        lse_b: like `lse_a`.

    Returns:
        out `[B, H, N, D]` in the dtype of `out_a` (memory order B, N, H, D), lse `[B, H, N]` fp32. Rows without
        keys on both sides give 0 and -inf.

    Raises:
        ValueError: a rank, shape, device or dtype that does not fit, with the value.

    Source: online softmax merging, FlashAttention-2 (2307.08691), section 3.1.

    >>> import torch, scrimp
    >>> out, lse = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)
    >>> merged, total = scrimp.ops.merge_attention(out, lse, 3 * out, lse)
    >>> merged[0, 0, 0].tolist(), round(total[0, 0, 0].item(), 4)
    ([2.0, 2.0, 2.0, 2.0], 0.6931)
    """
    _check(out_a, lse_a, out_b, lse_b)
    return _call(out_a, lse_a, out_b, lse_b)
