"""vq_sample: the next token from a head whose tokens share the rows of a codebook, without its logits."""

import math

import torch
from torch import Tensor

from .._registry import register
from ._check import check_dtype, check_same
from ._noise import gumbel
from ._vq import check_head, check_values, token_scores

SCHEMA = (
    "(Tensor h, Tensor codebook, Tensor codes, Tensor? bias, Tensor temperature, Tensor seed, Tensor position, "
    "int top_k, float top_p, float min_p) -> Tensor"
)
OP = "vq_sample"


def _check(
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
) -> None:
    check_head(OP, h, codebook, codes, bias)
    check_dtype(OP, "temperature", temperature, (torch.float32,))
    check_dtype(OP, "seed", seed, (torch.int64,))
    check_dtype(OP, "position", position, (torch.int64,))
    numbers = {"temperature": temperature, "seed": seed, "position": position}
    check_same(OP, "device", h=h.device, **{name: tensor.device for name, tensor in numbers.items()})
    shapes = {name: tuple(tensor.shape) for name, tensor in numbers.items()}
    check_same(OP, "shape", rows_of_h=tuple(h.shape[:-1]), **shapes)
    if top_k < 0:
        raise ValueError(f"{OP}: top_k={top_k} must not be negative; 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"{OP}: top_p={top_p} must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{OP}: min_p={min_p} must be from 0 to 1")
    if codes.shape[-1] == 0 and seed.numel() > 0:
        raise ValueError(f"{OP}: codes of shape {list(codes.shape)} offer no token")


def _fake(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, temperature: Tensor, seed: Tensor, *rest: object
) -> Tensor:
    _check(h, codebook, codes, bias, temperature, seed, *rest)  # type: ignore[arg-type]
    return seed.new_empty(seed.shape)


def _filtered(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Scores `[V]` with -inf for the tokens that the filters leave out."""
    values, order = scores.sort(descending=True, stable=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if 0 < top_k < len(values):
        keep &= values >= values[top_k - 1]
    if top_p < 1:
        mass = (values.double() - values[0].double()).exp() * keep
        keep &= mass.cumsum(0) - mass < top_p * mass.sum()
    if min_p > 0:
        keep &= values >= values[0] + math.log(min_p)
    return scores.masked_fill(torch.empty_like(keep).scatter_(0, order, ~keep), -torch.inf)


def _choose(
    logits: Tensor, temperature: float, seed: int, position: int, top_k: int, top_p: float, min_p: float
) -> int:
    """The token for `position` from logits `[V]`; -1 where none can be chosen."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = precise / temperature if temperature else precise
    best = scores.max()
    if best.isnan() or best == -torch.inf:
        return -1
    if temperature == 0 or best == torch.inf:
        return int(scores.argmax())
    noise = gumbel(seed, position, torch.arange(len(scores), device=scores.device))
    return int((_filtered(scores, top_k, top_p, min_p).double() + noise).argmax())


def reference(
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
) -> Tensor:
    _check(h, codebook, codes, bias, temperature, seed, position, top_k, top_p, min_p)
    check_values(OP, codebook, codes)
    for i, value in enumerate(temperature.flatten().tolist()):
        if not 0 <= value < math.inf:
            raise ValueError(f"{OP}: temperature of row {i} is {value}; it must be finite and not negative")
    if not seed.numel():
        return seed.new_empty(seed.shape)
    logits = token_scores(h @ codebook.T, codes, bias).view(-1, codes.shape[-1])
    numbers = zip(temperature.flatten().tolist(), seed.flatten().tolist(), position.flatten().tolist(), strict=True)
    chosen = [_choose(row, *some, top_k, top_p, min_p) for row, some in zip(logits, numbers, strict=True)]
    return torch.tensor(chosen, device=seed.device).view(seed.shape)


_call = register(OP, SCHEMA, fake=_fake, reference=reference)


def vq_sample(
    h: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Chooses a token for each row as if from the logits of `scrimp.ops.vq_logits`, which are never stored.

    token = argmax_v(logits_v / temperature + g_v) over the tokens that the filters keep

    g_v is Gumbel noise of (seed, position, v) alone, that of `scrimp.ops.tree_accept` and `scrimp.generate`: the token
    is the one that they draw from the same logits, so it has the distribution of their softmax, and a draft by a VQ
    head agrees with a dense head's draw as often as their logits let it. The hash behind the noise is the same on every
    device, its logarithms are those of the device's double precision: from equal logits, tokens can differ only where
    two sums of score and noise agree to some 15 digits. At temperature 0 there is no noise, and of
    equal logits, as the tokens of one code have, the lowest id wins. The memory besides the scores of the codes does
    not depend on V.

    Args:
        h: `[.., d]` fp32 or bf16; any strides.
        codebook: `[K, d]`, dtype of `h`; elements of a row adjacent.
        codes: int32 `[V]` or `[G, V]`, as in `vq_logits`.
        bias: `[V]`, dtype of `h`.
        temperature: fp32 `[..]`, finite, not negative.
        seed: int64 `[..]`.
        position: int64 `[..]`, absolute position of the token.
        top_k: keep the k largest logits and equals of the last; 0 keeps all.
        top_p: then keep the fewest tokens whose probabilities sum to at least top_p, of equal ones the lower ids.
        min_p: then keep tokens of at least min_p times the largest probability.

    Returns:
        tokens int64 `[..]`; -1 where none can be chosen: a logit is NaN, or all are -inf.

    Raises:
        ValueError: a shape, device, dtype or option that does not fit, with the value.
        RuntimeError: codes or temperatures out of range (ValueError by the reference). On a GPU, where no value is read
            on the host, the tokens of such rows are -1 instead.

    Source: VQ-Logits (2505.10202); Gumbel-max with counter-based noise, as in `tree_accept`.

    >>> import torch, scrimp
    >>> h, codebook = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> codes, number = torch.tensor([0, 1, 1, 0], dtype=torch.int32), torch.tensor([3])
    >>> scrimp.ops.vq_sample(h, codebook, codes, temperature=torch.zeros(1), seed=number, position=number).tolist()
    [1]
    """
    try:
        return _call(h, codebook, codes, bias, temperature, seed, position, top_k, top_p, min_p)
    except RuntimeError:
        _check(h, codebook, codes, bias, temperature, seed, position, top_k, top_p, min_p)  # names what does not fit
        raise
