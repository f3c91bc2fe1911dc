"""HeadScreen: an output head in few bits, with what it takes to bound the error of every logit computed from it.

    w . h = w' . (R h),   w' = s (q + e)

R is a basis of few, mostly short coordinates (or the identity), s the row's scale, q its integers, e the rest. The
coordinates are cut into groups of 64: the first `wide` groups have 8 bits each, the others 4. Of each group the screen
keeps the largest |e| and |q| over all rows, so that a row's error is at most s times one number of the hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # coordinates that share a step of the hidden state, and a bound
TILE = 16  # rows of the head that lie interleaved
LARGEST, LARGEST_BYTE = 32639, 127  # of the integers for a hidden state's coordinates: two signed bytes, or one
SHARE_ON_CPU, SHARE_ON_GPU = 0.1, 0.0  # of `HeadScreen.interval`
UNIT = 2.0**-24  # of a rounding to fp32
WIDE, NARROW = 8, 4  # bits
BLOCK = 8192  # rows built at once


@dataclass(frozen=True)
class HeadScreen:
    """The packed screen of a head `[V, K]`: D = 64 G coordinates, T = ceil(V / 16) tiles.

    Attributes:
        codes: uint8 `[T, bytes]`, the integers of 16 rows: group by group, 8 or 4 bits of each; see `pack`.
        scales: fp32 `[16 T]`, one for each row, 0 behind the last.
        basis: fp32 `[D, K]`, R; None for the identity with zeros up to D.
        error: fp32 `[G]`, the largest |e| of a row in each group.
        norm: fp32 `[G]`, the largest |q| of a row in each group.
        slack: for a hidden state of length 1 and a scale of 1, all other errors: rounding of R h and of the dense head.
        rows: V.
        wide: groups of 8 bits.
    """

    codes: Tensor
    scales: Tensor
    basis: Tensor | None
    error: Tensor
    norm: Tensor
    slack: float
    rows: int
    wide: int

    @classmethod
    def build(cls, weight: Tensor, states: Tensor | None = None, *, wide: int | None = None) -> HeadScreen:
        """The screen of a head.

        Args:
            weight: `[V, K]` fp32 or bf16, finite.
            states: hidden states `[n, K]` of typical text: their principal components become the basis, and the
                first `wide` groups of them keep 8 bits. Without any the basis is the identity, with 8 bits throughout.
            wide: groups of 8 bits; all without states, else two fifths of them.

        Raises:
            ValueError: shapes that do not fit, a weight or states that are not finite, `wide` out of range.

        >>> import torch
        >>> screen = HeadScreen.build(torch.randn(100, 64))
        >>> screen.codes.shape, screen.nbytes
        (torch.Size([7, 1024]), 7624)
        """
        if weight.dim() != 2:
            raise ValueError(f"HeadScreen: weight must be [V, K], got shape {list(weight.shape)}")
        K = weight.shape[1]
        if states is not None and (states.dim() != 2 or states.shape[1] != K):
            raise ValueError(f"HeadScreen: states has shape {list(states.shape)}, expected [n, {K}]")
        for name, tensor in (("weight", weight), ("states", states)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"HeadScreen: {name} has a value that is not finite")
        groups = -(-K // GROUP)
        wide = (groups if states is None else -(-2 * groups // 5)) if wide is None else wide
        if not 0 <= wide <= groups:
            raise ValueError(f"HeadScreen: wide={wide} must be from 0 to {groups}, the groups of {K} inputs")
        levels = _levels(groups, wide, weight.device)
        basis = None if states is None or not len(states) else _basis(weight, states, levels)
        return _build(weight, basis, levels, wide)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, the basis among them."""
        return sum(tensor.nbytes for tensor in self.tensors().values() if tensor is not None)

    def tensors(self) -> Mapping[str, Tensor | None]:
        """Codes, scales, basis, error and norm by name."""
        return {name: getattr(self, name) for name in ("codes", "scales", "basis", "error", "norm")}

    def to(self, device: torch.device) -> HeadScreen:
        """The same on another device."""
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in self.tensors().items()}
        return HeadScreen(**moved, slack=self.slack, rows=self.rows, wide=self.wide)  # type: ignore[arg-type]

    def interval(self, x: Tensor, share: float = SHARE_ON_GPU) -> tuple[Tensor, Tensor]:
        """Centre `[M, V]` and half width `[M, V]` (float64) of intervals that hold the dense head's fp32 logits.

            w . h = s (q . n + q . r + e . h),   |q . r + e . h| <= sum over groups of norm |r| + error |h|

        n are the coordinates h of the state, rounded to integers under one step a group, and r is what they leave over.
        The interval holds for any n. A group's integers have 8 bits where its norm |r| is then at most `share` of the
        sum of error |h| and of the slack, else 16.

        Args:
            x: hidden states `[M, K]`.
            share: that of the kernels for CPUs, whatever their instructions, is SHARE_ON_CPU; those for GPUs have 16
                bits everywhere, SHARE_ON_GPU, and four times the slack.
        """
        x = x.float()
        h = (x @ self.basis.T if self.basis is not None else _padded(x, GROUP * len(self.error))).double()
        h = h.view(len(x), -1, GROUP)
        error, norm = self.error.double(), self.norm.double()
        length = h.norm(dim=-1)
        bound = length @ error + self.slack * x.double().norm(dim=-1)
        coarse = _rounded(h, LARGEST_BYTE)
        few = (h - coarse).norm(dim=-1) * norm <= share * bound[:, None]
        rounded = torch.where(few[..., None], coarse, _rounded(h, LARGEST))
        rest = (h - rounded).norm(dim=-1)
        bound = bound + rest @ norm + (2 * len(error) + 8) * UNIT * ((length + rest) @ norm)
        q = unpack(self.codes, len(error), self.wide)[: self.rows].double()
        scales = self.scales[: self.rows].double()
        return rounded.flatten(1) @ q.T * scales, bound[:, None] * scales


def _rounded(h: Tensor, largest: int) -> Tensor:
    """Coordinates `[M, G, 64]` as multiples, up to the `largest`, of one fp32 step a group."""
    step = (h.abs().amax(-1, keepdim=True).float() / largest).double()
    return torch.where(step > 0, (h / step).round().clamp(-largest, largest), 0.0) * step


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _levels(groups: int, wide: int, device: torch.device) -> Tensor:
    """The largest integer of each coordinate, float64 `[64 G]`."""
    bits = torch.tensor([WIDE] * wide + [NARROW] * (groups - wide), device=device)
    return (2.0 ** (bits - 1) - 1).double().repeat_interleave(GROUP)


def _basis(weight: Tensor, states: Tensor, levels: Tensor) -> Tensor:
    """Principal components of the states, each scaled so that the head's rows use the levels of its coordinate."""
    K = weight.shape[1]
    some = states.double()
    _, vectors = torch.linalg.eigh(some.T @ some)
    axes = vectors.flip(1).T  # [K, K], the most energetic first
    spread = torch.full((K,), 1e-6, dtype=torch.float64, device=weight.device)
    for part in weight.split(BLOCK):
        unit = part.double() / part.double().norm(dim=1, keepdim=True).clamp(min=2.0**-100)
        spread = torch.maximum(spread, (unit @ axes.T).abs().amax(0))
    basis = torch.zeros(len(levels), K, dtype=torch.float64, device=weight.device)
    basis[:K] = axes * (spread / levels[:K]).unsqueeze(1)
    return basis.float()


def _build(weight: Tensor, basis: Tensor | None, levels: Tensor, wide: int) -> HeadScreen:
    V, K = weight.shape
    groups, tiles = len(levels) // GROUP, -(-V // TILE)
    wider = {"device": weight.device, "dtype": torch.float64}
    error, norm = torch.zeros(groups, **wider), torch.zeros(groups, **wider)  # type: ignore[call-overload]
    extent = residual = 0.0
    scales = torch.zeros(tiles * TILE, dtype=torch.float32, device=weight.device)
    codes = [torch.empty(0, tile_bytes(groups, wide), dtype=torch.uint8, device=weight.device)]
    inverse = None if basis is None else torch.linalg.inv(basis[:K].double())
    for first in range(0, V, BLOCK):
        part = weight[first : first + BLOCK].double()
        rows = part if inverse is None else part @ inverse
        if basis is not None:
            residual_rows = (part - rows @ basis[:K].double()).norm(dim=1)
        rows = _padded(rows, len(levels))
        scale = _padded(rows.abs() / levels, len(levels) + 1).amax(1).clamp(min=2.0**-100).float()
        s = scale.double().unsqueeze(1)
        q = torch.minimum(torch.maximum((rows / s).round(), -levels), levels)
        error = torch.maximum(error, (rows / s - q).view(len(q), groups, GROUP).norm(dim=2).amax(0))
        norm = torch.maximum(norm, q.view(len(q), groups, GROUP).norm(dim=2).amax(0))
        extent = max(extent, float((part.norm(dim=1) / s[:, 0]).max()))
        if basis is not None:
            residual = max(residual, float((residual_rows / s[:, 0]).max()))
        scales[first : first + len(q)] = scale
        codes.append(pack(q, wide))
    frobenius = torch.zeros(groups, **wider) if basis is None else basis.double().view(groups, -1).norm(dim=1)  # type: ignore[call-overload]
    rounding = (K + 16) * UNIT * 1.01
    slack = rounding * (float(frobenius @ (error + norm)) + extent) + residual + 1e-12 * extent
    up = 1 + 2.0**-20  # above every rounding of the sums here
    return HeadScreen(torch.cat(codes), scales, basis, (error * up).float(), (norm * up).float(), slack * up, V, wide)


def tile_bytes(groups: int, wide: int) -> int:
    """Bytes of a tile's codes."""
    return TILE * GROUP * (WIDE * wide + NARROW * (groups - wide)) // 8


def pack(q: Tensor, wide: int) -> Tensor:
    """Integers `[V, 64 G]` -> codes `[T, bytes]`.

    A group of b bits is 2 b vectors of 16 rows x 2 words of 16 bits; word j of a row holds, from its lowest bits up,
    coordinates 2 i + j for 16 / b consecutive i, each plus 2^(b-1).
    """
    V, D = q.shape
    tiles = -(-V // TILE)
    q = torch.nn.functional.pad(q, (0, 0, 0, tiles * TILE - V)).int().view(tiles, TILE, D)
    found = []
    for bits, part in ((WIDE, q[:, :, : GROUP * wide]), (NARROW, q[:, :, GROUP * wide :])):
        fields = 16 // bits
        vectors = part.shape[2] // (2 * fields)
        # tile, row, vector, field, word -> tile, vector, row, word, field
        field = (part + 2 ** (bits - 1)).reshape(tiles, TILE, vectors, fields, 2).permute(0, 2, 1, 4, 3)
        weights = 2 ** (bits * torch.arange(fields, dtype=torch.int32, device=q.device))
        words = (field * weights).sum(-1, dtype=torch.int32)
        pair = torch.stack([words & 255, words >> 8], -1)
        found.append(pair.to(torch.uint8).reshape(tiles, 4 * TILE * vectors))
    return torch.cat(found, 1)


def unpack(codes: Tensor, groups: int, wide: int) -> Tensor:
    """The integers of `pack`, int32 `[16 T, 64 G]`."""
    tiles, split = codes.shape[0], tile_bytes(wide, wide)
    found = []
    for bits, part, count in ((WIDE, codes[:, :split], wide), (NARROW, codes[:, split:], groups - wide)):
        fields = 16 // bits
        pair = part.reshape(tiles, 2 * bits * count, TILE, 2, 2).int()
        words = pair[..., 0] + 256 * pair[..., 1]  # tile, vector, row, word
        shifts = bits * torch.arange(fields, dtype=torch.int32, device=codes.device)
        field = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
        found.append(field.permute(0, 2, 1, 4, 3).reshape(tiles, TILE, GROUP * count) - 2 ** (bits - 1))
    return torch.cat(found, 2).reshape(tiles * TILE, GROUP * groups)
