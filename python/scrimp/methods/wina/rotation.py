"""The rotation of WINA: a basis in which the columns of a weight are orthogonal, so that dropped channels add up.

The paper turns the residual stream itself, folds the norms' weights away, unties the embeddings and multiplies every
residual by a dense `[d, d]` matrix between two sublayers, whose bases differ. Turning the input of the layers instead,
y = (W Q) (Q^T x), is the same product at the same cost, one `[d, d]` matrix for each input, and leaves norms, residuals
and embeddings as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def axes(weight: Tensor) -> Tensor:
    """The right singular vectors of a weight.

    Args:
        weight: `[N, K]`, all layers of one input stacked: they choose channels together.

    Returns:
        fp32 `[K, K]`, orthonormal rows Q^T, such that W Q has orthogonal columns.

    Source: WINA (2505.19427) appendix A.2, which takes the vectors of the keys' or the gates' weight alone.
    """
    wide = weight.double()
    return torch.linalg.eigh(wide.T @ wide).eigenvectors.T.contiguous().float()
