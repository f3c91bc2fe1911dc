"""channel_select: which input channels of a linear layer these rows need, as an ordered list and as masked rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, check_dtype, check_same

SCHEMA = (
    "(Tensor x, Tensor level, Tensor? scale, Tensor? center, Tensor? whole, int rule, bool common) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
CUDA_CHANNELS = 24 * 1024  # of which CUDA C++ finds the largest
RULES = ("threshold", "relative", "top_k", "top_p")
Selected = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(
    x: Tensor,
    level: Tensor,
    scale: Tensor | None,
    center: Tensor | None,
    whole: Tensor | None,
    rule: int,
    common: bool,
) -> None:
    op = "channel_select"
    if not 0 <= rule < len(RULES):
        raise ValueError(f"{op}: rule={rule} must be an index of {RULES}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [.., K], got a scalar")
    check_dtype(op, "x", x, FLOATS)
    if tuple(level.shape) != (1,):
        raise ValueError(f"{op}: level must be one number, [1], got shape {list(level.shape)}")
    numbers = {"level": level, "scale": scale, "center": center}
    for name, tensor in numbers.items():
        if tensor is not None:
            check_dtype(op, name, tensor, (torch.float64 if x.dtype == torch.float64 else torch.float32,))
    for name, tensor in (("scale", scale), ("center", center)):
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"{op}: {name} must be [K={x.shape[-1]}], one number a channel, got {list(tensor.shape)}")
    if whole is not None:
        check_dtype(op, "whole", whole, (torch.bool,))
        check_same(op, "shape", rows_of_x=tuple(x.shape[:-1]), whole=tuple(whole.shape))
    others = {name: tensor.device for name, tensor in {**numbers, "whole": whole}.items() if tensor is not None}
    check_same(op, "device", x=x.device, **others)


def _fake(x: Tensor, level: Tensor, *rest: object) -> Selected:
    _check(x, level, *rest)  # type: ignore[arg-type]
    K = x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(K, dtype=torch.int32),
        x.new_empty(1, dtype=torch.int32),
        level.new_empty(*x.shape[:-1], 2),
    )


def _keep(score: Tensor, level: Tensor, rule: str) -> Tensor:
    """Which scores `[M, K]` a rule keeps; those that are NaN, always."""
    if rule == "threshold":
        return ~(score <= level)
    if rule == "relative":
        cut = level * score.mean(-1, keepdim=True)
        return ~(score <= cut.clamp(max=torch.finfo(cut.dtype).max))
    order = score.argsort(dim=-1, descending=True, stable=True)  # NaN first; of equal scores the lower channel
    rank = order.argsort(dim=-1)
    if rule == "top_k":
        return (rank < level) | score.isnan()
    energy = score.double().square().gather(-1, order)
    total = energy.cumsum(-1)
    enough = (total - energy).gather(-1, rank) >= level.double() * total[:, -1:]
    return ~(torch.where(level < 1, enough, score <= 0))


def reference(
    x: Tensor,
    level: Tensor,
    scale: Tensor | None,
    center: Tensor | None,
    whole: Tensor | None,
    rule: int,
    common: bool,
) -> Selected:
    _check(x, level, scale, center, whole, rule, common)
    K = x.shape[-1]
    moved = x.to(level.dtype).reshape(-1, K) if K else x.new_zeros(x.shape[:-1].numel(), 0, dtype=level.dtype)
    moved = moved if center is None else moved - center
    score = moved.abs() if scale is None else (moved * scale).abs()
    judged = score.square().mean(0, keepdim=True).sqrt() if common else score
    keep = _keep(judged, level, RULES[rule]).expand_as(score) if K else score.bool()
    if whole is not None:
        keep = keep | whole.reshape(-1, 1)
    energy = score.square()
    energies = torch.stack([energy.masked_fill(keep, 0).sum(-1), energy.sum(-1)], -1)
    kept = moved.masked_fill(~keep, 0).to(x.dtype)
    needed = keep.any(0)
    channels = torch.arange(K, device=x.device)
    index = torch.where(needed, channels, K).sort().values
    count = needed.sum().view(1).int()
    return kept.view(x.shape), index.masked_fill(channels >= count, -1).int(), count, energies.view(*x.shape[:-1], 2)


def _cuda_takes(x: Tensor, *args: object) -> bool:
    """Whether CUDA C++ does a call: 16- or 32-bit floats; where a cut is searched, scores that fit shared memory."""
    searched = args[4] in (RULES.index("top_k"), RULES.index("top_p"))
    return x.dtype != torch.float64 and (not searched or x.dim() == 0 or x.shape[-1] <= CUDA_CHANNELS)


_call = register("channel_select", SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def channel_select(
    x: Tensor,
    level: Tensor | float,
    *,
    rule: str = "threshold",
    scale: Tensor | None = None,
    center: Tensor | None = None,
    whole: Tensor | None = None,
    common: bool = False,
) -> Selected:
    """Chooses the input channels of a linear layer that matter for these rows.

    score_i = |(x_i - center_i) scale_i|;  kept_i = x_i - center_i where channel i is kept, else 0

    Scale 1 is TEAL, the norms of the weight's columns are WINA; with a center the layer's bias must hold W center.
    Nothing waits for the host: shapes do not depend on values. Scores that are NaN are kept whatever the rule.

    Args:
        x: `[.., K]` fp32, bf16 or fp16; any strides.
        level: `[1]` fp32, or a number; what it means depends on `rule`.
        rule: "threshold" keeps scores above `level`; "relative" those above `level` times the row's mean score, and
            infinite ones;
            "top_k" the `level` largest; "top_p" the fewest that hold the share `level` of the row's energy, the sum of
            its squared scores (from 1 on: all scores but 0). Of equal scores the lower channel counts as the larger.
        scale: `[K]` fp32 factors of the scores; 1 unless given.
        center: `[K]` fp32, subtracted from x; 0 unless given.
        whole: bool `[..]`, rows that keep every channel; none unless given.
        common: one choice for all rows, by the root of the mean over the rows of the squared scores, instead of one
            for each row.

    Returns:
        kept `[.., K]`, dtype of `x`, contiguous; index int32 `[K]`, channels that any row keeps, ascending, then -1;
        count int32 `[1]`, how many those are; energy fp32 `[.., 2]`, of each row the sum of squared scores of its
        dropped channels, and of all. The root of their quotient estimates the relative error of the layer's output.

    Raises:
        ValueError: a rank, shape, device, dtype or rule that does not fit, a negative or NaN `level`, with the value;
            on a GPU by "top_k" and "top_p" more than 24,576 channels; in Triton by "relative", too, more than 16,384,
            and by "top_p" more than 8,192.

    Source: WINA (2505.19427) equation 4, TEAL (2408.14690), centring as SCAP (2412.07174).

    >>> import torch, scrimp
    >>> x, norms = torch.tensor([[1.0, -4.0, 2.0, 0.0]]), torch.tensor([9.0, 1.0, 1.0, 1.0])
    >>> kept, index, count, energy = scrimp.ops.channel_select(x, 2, rule="top_k", scale=norms)
    >>> kept.tolist(), index.tolist(), energy.tolist()
    ([[1.0, -4.0, 0.0, 0.0]], [0, 1, -1, -1], [[4.0, 101.0]])
    """
    if rule not in RULES:
        raise ValueError(f"channel_select: rule={rule!r} must be one of {', '.join(RULES)}")
    if not isinstance(level, Tensor):
        if not level >= 0:
            raise ValueError(f"channel_select: level={level} must be at least 0")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        level = torch.tensor([level], dtype=wide, device=x.device)
    try:  # as in `linear`: the kernel's checks come first, the words of _check only where one fails
        return _call(x, level, scale, center, whole, RULES.index(rule), common)
    except RuntimeError:
        _check(x, level, scale, center, whole, RULES.index(rule), common)
        raise
