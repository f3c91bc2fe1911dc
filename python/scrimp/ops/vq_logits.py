"""vq_logits: the logits of a head whose tokens share the rows of a codebook."""

from torch import Tensor

from .._registry import register
from ._vq import check_head, check_values, token_scores

SCHEMA = "(Tensor h, Tensor codebook, Tensor codes, Tensor? bias) -> Tensor"
OP = "vq_logits"


def _fake(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    check_head(OP, h, codebook, codes, bias)
    return h.new_empty([*h.shape[:-1], codes.shape[-1]])


def reference(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    check_head(OP, h, codebook, codes, bias)
    check_values(OP, codebook, codes)
    return token_scores(h @ codebook.T, codes, bias)


_call = register(OP, SCHEMA, fake=_fake, reference=reference)


def vq_logits(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scores a codebook and gives every token the score of its code, or the sum of the scores of its codes.

    logits_v = sum_g h . codebook[codes[g, v]] + bias_v

    The scores are those of `scrimp.ops.linear`, so that a row of up to 64 does not depend on the others; a bf16 score
    is rounded before it is scattered. Tokens of one code and equal bias have the same logit.

    Args:
        h: `[.., d]` fp32 or bf16; any strides.
        codebook: `[K, d]`, dtype of `h`; elements of a row adjacent.
        codes: int32 `[V]`, the row of each token, or `[G, V]`: G rows whose scores add up (residual codes).
        bias: `[V]`, dtype of `h`, added last.

    Returns:
        logits `[.., V]`, contiguous, dtype of `h`.

    Raises:
        ValueError: a rank, shape, stride, device or dtype that does not fit, with the value.
        RuntimeError: a code that is no row of the codebook (ValueError by the reference). On a GPU, where no value is
            read on the host, the logits of its tokens are NaN instead.

    Source: VQ-Logits (2505.10202), scattered logits; the bias and sums of codes are ours.

    >>> import torch, scrimp
    >>> h, codebook = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> scrimp.ops.vq_logits(h, codebook, torch.tensor([0, 1, 1, 0], dtype=torch.int32)).tolist()
    [[1.0, 2.0, 2.0, 1.0]]
    """
    try:
        return _call(h, codebook, codes, bias)
    except RuntimeError:
        check_head(OP, h, codebook, codes, bias)  # names what does not fit
        raise
