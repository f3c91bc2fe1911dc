"""CodebookLayer: an activation becomes the mean (or sum) of the k codes that suit it best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...ops import codebook_topk
from ..heads import vq_build
from .snap import Chosen, StraightThrough

OP = "CodebookLayer"
LOSSES = ("task", "reconstruction", "commitment")


class CodebookLayer(nn.Module):
    """out = mean (or sum) of the k codes with the highest scores for x; the gradient passes straight through to x.

    What the codes learn from is the layer's `learn`:

    | learn | codes | x |
    |---|---|---|
    | "task" | the gradient of the model's loss, as if they had been chosen anyway | the same |
    | "reconstruction" | only `loss`, the mean square of out - x | the model's loss |
    | "commitment" | only `loss` | the same, and `commitment` times the mean square, which `loss` holds too |

    Args:
        codebook: `[C, D]`, or `[G, C, D]` for G codebooks, each for its slice of `[.., G D]`; becomes a parameter.
        k: codes of a row, from 1 to C and at most 64.
        euclidean: choose by distance, not by inner product.
        mean: out is the mean of the codes, not their sum.
        learn: one of `LOSSES`.
        commitment: weight of x's share of `loss`.

    Attributes:
        index: int32 `[.., k]` or `[.., G, k]`, the codes of the last call, best first.
        loss: what "reconstruction" and "commitment" add to the model's loss for the last call; None otherwise.
        counts: int64 `[G, C]`, how often each code was chosen in training since `replace_dead`.

    Raises:
        ValueError: arguments that do not fit, with the value.

    >>> import torch
    >>> from scrimp.methods.codebook import CodebookLayer
    >>> layer = CodebookLayer(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [2.0, 2.0]]), k=2)
    >>> layer.disable(3)
    >>> layer(torch.tensor([[1.0, 2.0]])).tolist(), layer.index.tolist()
    ([[1.5, 0.5]], [[2, 1]])
    """

    counts: Tensor
    steer: Tensor | None

    def __init__(
        self,
        codebook: Tensor,
        k: int = 8,
        *,
        euclidean: bool = False,
        mean: bool = True,
        learn: str = "task",
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        if learn not in LOSSES:
            raise ValueError(f"{OP}: learn={learn!r} must be one of {', '.join(LOSSES)}")
        if not commitment >= 0:
            raise ValueError(f"{OP}: commitment={commitment} must not be negative")
        if codebook.dim() not in (2, 3) or not codebook.is_floating_point():
            kind = f"{str(codebook.dtype).removeprefix('torch.')} {list(codebook.shape)}"
            raise ValueError(f"{OP}: codebook must be floats [C, D] or [G, C, D], got {kind}")
        if not codebook.isfinite().all():
            raise ValueError(f"{OP}: codebook has values that are not finite")
        codebook = codebook.detach().clone(memory_format=torch.contiguous_format)
        self.groups = codebook.shape[0] if codebook.dim() == 3 else 1
        codebook_topk(codebook.new_empty(0, self.groups * codebook.shape[-1]), codebook, k)  # its checks hold here
        self.codebook = nn.Parameter(codebook)
        self.k, self.euclidean, self.mean = k, euclidean, mean
        self.learn, self.commitment = learn, commitment
        self.index: Tensor | None = None
        self.loss: Tensor | None = None
        self.handle: RemovableHandle | None = None  # of the hook that calls the layer in a model
        self._seen: Tensor | None = None  # the rows of the last call in training
        counts = torch.zeros(self.groups, codebook.shape[-2], dtype=torch.int64, device=codebook.device)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("steer", None, persistent=False)

    @classmethod
    def from_rows(
        cls,
        rows: Tensor,
        codes: int,
        k: int = 8,
        *,
        groups: int = 0,
        iterations: int = 10,
        seed: int = 0,
        **options: Any,
    ) -> CodebookLayer:
        """Codes that are the centroids of activations, by k-means.

        Args:
            rows: `[N, D]`, or `[N, G D]`; N at least `codes`.
            codes: C.
            k: as in the class, with the other `options`.
            groups: G, each with a codebook of its own; 0 for one of `[C, D]`.
            iterations: of k-means, at most.
            seed: of its first centroids.

        Raises:
            ValueError: fewer rows than codes, values that are not finite, a width that the groups do not divide.
        """
        if rows.dim() != 2 or not rows.is_floating_point():
            kind = f"{str(rows.dtype).removeprefix('torch.')} {list(rows.shape)}"
            raise ValueError(f"{OP}: rows must be floats [N, D], got {kind}")
        if not 1 <= codes <= len(rows):
            raise ValueError(f"{OP}: codes={codes} must be from 1 to the {len(rows)} rows")
        if groups < 0 or rows.shape[1] % max(groups, 1):
            raise ValueError(f"{OP}: groups={groups} must divide rows of {rows.shape[1]} numbers")
        if not rows.isfinite().all():
            raise ValueError(f"{OP}: rows has values that are not finite")
        rows = rows.detach()
        generator = torch.Generator(rows.device).manual_seed(seed)
        books = []
        for part in rows.float().chunk(max(groups, 1), 1):
            alike = part.new_ones(len(part))
            index = vq_build.k_means(part, codes, alike, iterations, generator)
            books.append(vq_build.means(part, index, codes, alike))
        codebook = torch.stack(books) if groups else books[0]
        return cls(codebook.to(rows.dtype), k, **options)

    def forward(self, x: Tensor) -> Tensor:
        book = self.codebook.detach()
        steer = None if self.steer is None else self.steer.to(torch.promote_types(book.dtype, torch.float32))
        out, self.index, _ = codebook_topk(x.detach(), book, self.k, steer, euclidean=self.euclidean, mean=self.mean)
        self.loss = None
        if self.training:
            self._note(x)
        if not (torch.is_grad_enabled() and (x.requires_grad or self.codebook.requires_grad)):
            return out
        chosen: Tensor = Chosen.apply(self.codebook, self.index, out, self.mean)
        if self.learn == "task":
            return StraightThrough.apply(x, chosen)
        self.loss = (chosen.float() - x.detach().float()).square().mean()
        if self.learn == "commitment":
            self.loss = self.loss + self.commitment * (x.float() - out.float()).square().mean()
        return StraightThrough.apply(x, out)

    def _note(self, x: Tensor) -> None:
        """Counts the codes of the last call, and keeps its rows for `replace_dead`."""
        G, C = self.counts.shape
        places = self.index.view(-1, G, self.k).long()  # type: ignore[union-attr]
        flat = torch.where(places < 0, G * C, places + C * torch.arange(G, device=places.device)[:, None])
        self.counts += torch.bincount(flat.flatten(), minlength=G * C + 1)[:-1].view(G, C)
        self._seen = x.detach().reshape(-1, G, x.shape[-1] // G)

    @torch.no_grad()
    def replace_dead(self, least: int = 1, seed: int = 0) -> int:
        """Puts random rows of the last training call in the place of codes chosen less than `least` times.

        Counting starts again. Returns how many codes were replaced.

        Raises:
            ValueError: there was no training call since.
        """
        if self._seen is None or not len(self._seen):
            raise ValueError(f"{OP}: replace_dead needs rows; call the layer in training mode first")
        books = self.codebook.view(self.groups, *self.codebook.shape[-2:])
        generator = torch.Generator().manual_seed(seed)
        group, code = (self.counts < least).nonzero(as_tuple=True)
        row = torch.randint(len(self._seen), (len(code),), generator=generator).to(code.device)
        books[group, code] = self._seen[row, group].to(books.dtype)
        self.counts.zero_()
        self._seen = None
        return len(code)

    def disable(self, codes: int | Sequence[int], group: int = 0) -> None:
        """These codes of a group are never chosen, until `release`."""
        self._steer(codes, group, -torch.inf)

    def force(self, codes: int | Sequence[int], group: int = 0) -> None:
        """These codes of a group, at most k, are among the chosen of every row, until `release`."""
        self._steer(codes, group, torch.inf)

    def release(self) -> None:
        """Codes are chosen by their scores alone again."""
        self.steer = None

    def _steer(self, codes: int | Sequence[int], group: int, value: float) -> None:
        G, C = self.counts.shape
        wanted = [codes] if isinstance(codes, int) else list(codes)
        if not 0 <= group < G:
            raise ValueError(f"{OP}: group={group} is not one of the {G} groups")
        for code in wanted:
            if not 0 <= code < C:
                raise ValueError(f"{OP}: code {code} is not one of the {C} codes")
        kind = torch.promote_types(self.codebook.dtype, torch.float32)
        shape = self.codebook.shape[:-1]
        steer = self.counts.new_zeros(shape, dtype=kind) if self.steer is None else self.steer.clone()
        own = steer.view(G, C)[group]
        own[wanted] = value
        if (forced := int((own == torch.inf).sum())) > self.k:
            raise ValueError(f"{OP}: {forced} codes of group {group} would be forced, but a row has k={self.k}")
        self.steer = steer

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files do not hold what the last call left behind."""
        return self.__dict__ | {"index": None, "loss": None, "_seen": None}

    def extra_repr(self) -> str:
        G, C = self.counts.shape
        return f"groups={G}, codes={C}, width={self.codebook.shape[-1]}, k={self.k}, learn={self.learn}"
