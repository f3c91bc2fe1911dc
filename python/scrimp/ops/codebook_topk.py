"""codebook_topk: the k codes of a codebook that suit a row best, and their mean or sum, without the score matrix."""

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, check_dtype, check_same

SCHEMA = (
    "(Tensor x, Tensor codebook, Tensor? bias, int k, bool euclidean, bool mean) "
    "-> (Tensor out, Tensor index, Tensor scores)"
)
OP = "codebook_topk"
MOST = 64  # codes of a row


def _check(x: Tensor, codebook: Tensor, bias: Tensor | None, k: int, euclidean: bool, mean: bool) -> None:
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must be [.., D], got a scalar")
    check_dtype(OP, "x", x, FLOATS)
    check_same(OP, "dtype", x=x.dtype, codebook=codebook.dtype)
    check_same(OP, "device", x=x.device, codebook=codebook.device)
    if codebook.dim() not in (2, 3) or (codebook.dim() == 3 and codebook.shape[0] == 0):
        raise ValueError(f"{OP}: codebook has shape {list(codebook.shape)}, expected [C, D] or [G, C, D]")
    groups, (codes, width) = codebook.shape[0] if codebook.dim() == 3 else 1, codebook.shape[-2:]
    if x.shape[-1] != groups * width:
        raise ValueError(
            f"{OP}: x has shape {list(x.shape)}, but codebook {list(codebook.shape)} takes rows of {groups * width}"
        )
    if width > 1 and codebook.stride(-1) != 1:
        raise ValueError(f"{OP}: codebook has strides {codebook.stride()}; the elements of a code must be adjacent")
    if not 1 <= k <= min(codes, MOST):
        raise ValueError(f"{OP}: k={k} must be from 1 to the {codes} codes of a codebook, and at most {MOST}")
    if bias is not None:
        check_dtype(OP, "bias", bias, (torch.promote_types(x.dtype, torch.float32),))
        check_same(OP, "device", x=x.device, bias=bias.device)
        if bias.shape != codebook.shape[:-1]:
            raise ValueError(f"{OP}: bias has shape {list(bias.shape)}, expected {list(codebook.shape[:-1])}")


def _fake(
    x: Tensor, codebook: Tensor, bias: Tensor | None, k: int, euclidean: bool, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, codebook, bias, k, euclidean, mean)
    found = (*x.shape[:-1], *codebook.shape[:-2], k)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(found, dtype=torch.int32), x.new_empty(found, dtype=wide)


def reference(
    x: Tensor, codebook: Tensor, bias: Tensor | None, k: int, euclidean: bool, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Stores all scores."""
    _check(x, codebook, bias, k, euclidean, mean)
    wide = torch.promote_types(x.dtype, torch.float32)
    books = (codebook if codebook.dim() == 3 else codebook[None]).to(wide)  # [G, C, D]
    groups, codes, width = books.shape
    scores = torch.einsum("...gd,gcd->...gc", x.unflatten(-1, (groups, width)).to(wide), books)
    if euclidean:
        scores = scores - books.square().sum(-1) / 2
    if bias is not None:
        scores = scores + bias.view(groups, codes)
    broken = scores.isnan().any(-1, keepdim=True)  # [.., G, 1]
    values, index = scores.sort(dim=-1, descending=True, stable=True)
    values, index = values[..., :k], index[..., :k]
    none = (values == -torch.inf) | broken
    chosen = books[torch.arange(groups, device=x.device)[:, None], index]  # [.., G, k, D]
    out = chosen.masked_fill(none[..., None], 0).sum(-2)
    if mean:
        out = out / (~none).sum(-1, keepdim=True).clamp(min=1)
    out = out.masked_fill(broken, torch.nan).flatten(-2).to(x.dtype)
    shape = (*x.shape[:-1], *codebook.shape[:-2], k)
    index, values = index.masked_fill(none, -1).int(), values.masked_fill(broken, torch.nan)
    return out, index.reshape(shape), values.reshape(shape)


def _cuda_takes(x: Tensor, codebook: Tensor, *_: object) -> bool:
    """Whether CUDA C++ does a call: numbers in 16 bits, codes that begin at multiples of 16 bytes."""
    whole = codebook.dim() > 1 and codebook.shape[-1] > 0 and codebook.shape[-1] % 8 == 0
    near = whole and codebook.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in codebook.stride()[:-1])
    return near and x.dtype in (torch.float16, torch.bfloat16)


_call = register(OP, SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def codebook_topk(
    x: Tensor,
    codebook: Tensor,
    k: int = 8,
    bias: Tensor | None = None,
    *,
    euclidean: bool = False,
    mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k codes with the highest scores for each row, and their mean or sum; no row's scores are all stored.

    score_c = x . codebook_c + bias_c, with `euclidean` less |codebook_c|^2 / 2: the order of the distances |x - c|
    out = mean (or sum) of the k codes with the highest scores; of equal scores the lower code comes first

    A code whose score is -inf is never chosen, which a bias can bring about: where less than k are left, the last
    places hold -1 and -inf, and the mean is that of the others (zeros where there are none). A row with a score that
    is NaN, chosen or not, has index -1, scores NaN and out NaN. Scores are summed in fp32 in the order of D. A row's
    result has the same bits whatever the other rows, their number and the number of threads are.

    Args:
        x: `[.., D]`, or `[.., G D]` for G codebooks, each for its own slice; fp32, bf16 or fp16; any strides.
        codebook: `[C, D]` or `[G, C, D]`, dtype of `x`; elements of a code adjacent.
        k: codes of a row, from 1 to C and at most 64.
        bias: `[C]` or `[G, C]` fp32, added to the scores; 0 unless given.
        euclidean: score by distance, not by inner product.
        mean: out is the mean of the codes, not their sum.

    Returns:
        out, shape and dtype of `x`, contiguous; index int32 `[.., k]` or `[.., G, k]`, best first; scores fp32, shape
        of `index`. (float64 input, by the reference, has float64 scores and bias.)

    Raises:
        ValueError: a shape, stride, device, dtype or k that does not fit, with the value.

    Source: Codebook Features (2310.17230), which takes the mean.

    >>> import torch, scrimp
    >>> x, codebook = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [2.0, 2.0]])
    >>> out, index, scores = scrimp.ops.codebook_topk(x, codebook, 2)
    >>> out.tolist(), index.tolist(), scores.tolist()
    ([[2.5, 1.0]], [[3, 2]], [[6.0, 3.0]])
    """
    try:
        out, index, scores = _call(x, codebook, bias, k, euclidean, mean)
    except RuntimeError:
        _check(x, codebook, bias, k, euclidean, mean)  # names what does not fit
        raise
    return out, index, scores
