"""VQTraining: a VQ head that is learnt from scratch, its map with it, by straight-through gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import vq_build
from .vq import VQLogitsHead
from .vq_loss import check_target, code_weights


class VQTraining(nn.Module):
    """A row for each token, which a loss sees only through the mean row of the token's code.

    logits_v = h . c(codes_v) + bias_v, c_k the mean of the rows of code k, weighted by exp(bias)

    Gradients pass straight through c to the rows, as if each token had had its own: a row moves by its own token's
    errors, though the logits of a code's tokens are one. `refresh` gives each token the code that is now the nearest;
    without it the map stays as it was assigned. Nothing is as large as rows x V; the rows and their gradient are V x d,
    as those of a dense head, and are dropped after training.

    Args:
        rows: `[V, d]`, the first values; random ones, or those of a trained head.
        K: codes, from 1 to V.
        codes: int32 `[V]` below K; by `refresh` from K random rows unless given.
        bias: learn a bias for each token as well.
        seed: of the first codes.

    >>> import torch
    >>> from scrimp.methods.heads import VQTraining
    >>> training = VQTraining(torch.randn(50, 8), 5)
    >>> training.loss(torch.randn(3, 8), torch.tensor([1, 2, 3])).mean().backward()
    >>> training.head()
    VQLogitsHead(V=50, d=8, K=5, levels=1, bias=True)
    """

    codes: Tensor

    def __init__(self, rows: Tensor, K: int, codes: Tensor | None = None, *, bias: bool = True, seed: int = 0) -> None:
        super().__init__()
        if rows.dim() != 2 or 0 in rows.shape or not 1 <= K <= len(rows):
            raise ValueError(f"VQTraining: K={K} must be from 1 to the tokens of rows {list(rows.shape)}")
        self.rows = nn.Parameter(rows.detach().clone())
        self.bias = nn.Parameter(rows.new_zeros(len(rows))) if bias else None
        self.K = K
        if codes is None:
            generator = torch.Generator().manual_seed(seed)
            codes = vq_build.k_means(self.rows.detach(), K, rows.new_ones(len(rows)), 0, generator).int()
        # The head's own checks hold for the codes.
        self.register_buffer("codes", VQLogitsHead(rows.new_zeros(K, rows.shape[1]), codes).codes)
        if self.codes.dim() != 1 or len(self.codes) != len(rows):
            raise ValueError(f"VQTraining: codes has shape {list(self.codes.shape)}, expected [{len(rows)}]")

    def _shares(self) -> tuple[Tensor, Tensor]:
        """log S_k `[K]`, and exp(bias_v) / S of the token's code `[V]`."""
        weights = code_weights(self.codes, self.bias, self.K)
        logits = -weights[self.codes.long()]
        return weights, (logits if self.bias is None else logits + self.bias).exp()

    def _codebook(self, shares: Tensor) -> Tensor:
        index = self.codes.long()
        return self.rows.new_zeros(self.K, self.rows.shape[1]).index_add(0, index, self.rows * shares[:, None])

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy `[..]` of h `[.., d]` and tokens `[..]`, with gradients to h, the rows and the bias."""
        check_target("VQTraining", h, self.codes, target)
        weights, shares = self._shares()
        codebook = self._codebook(shares.detach())
        total = ((h @ codebook.T).masked_fill(weights == -torch.inf, 0) + weights).logsumexp(-1)
        own = self.rows[target]
        seen = own + (codebook[self.codes[target].long()] - own).detach()
        score = (h * seen).sum(-1)
        return total - (score if self.bias is None else score + self.bias[target])

    @torch.no_grad()
    def refresh(self, counts: Tensor | None = None) -> int:
        """One step of k-means: each token takes the nearest code; returns how many changed theirs.

        Args:
            counts: `[V]`, how often each token occurs: a code without a token takes the one that costs most.
        """
        weight = self.rows.new_ones(len(self.rows)) if counts is None else counts.to(self.rows.dtype) + 1
        distance, index = vq_build.nearest(self.rows, self._codebook(self._shares()[1]))
        empty = (torch.bincount(index, minlength=self.K) == 0).nonzero().view(-1)
        index[(distance * weight).topk(len(empty)).indices] = empty
        changed = int((index != self.codes).sum())
        self.codes.copy_(index)
        return changed

    @torch.no_grad()
    def head(self) -> VQLogitsHead:
        """What was learnt, for inference or for more training of the codebook alone."""
        return VQLogitsHead(self._codebook(self._shares()[1]), self.codes, self.bias)
