"""Int4Channels: a 4-bit weight turned so that the codes of an input channel lie side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .check import TILE, ZERO_KINDS, check_channels
from .pack import pack_nibbles, unpack_nibbles
from .weight import Int4Weight, ZeroKind


@dataclass(frozen=True, eq=False, repr=False)
class Int4Channels:
    """The codes, scales and zeros of an `Int4Weight` `[N, K]`, a channel (column) after the other; no value changes.

    codes        uint8 [K, 64 ceil(N / 128)]: of 128 outputs a channel holds 64 bytes; byte 16 a + 4 r + i (a, r, i
                 from 0 to 3) holds the code of output 32 r + 4 a + i in its low nibble and that of output
                 32 r + 16 + 4 a + i in its high one. Codes behind the last output are 0.
    scales       [K / group_size, N]
    zeros        [K / group_size, N], or None
    codebook, permutation, group_size, zero_kind, in_features: as those of the weight

    >>> import torch, scrimp
    >>> weight = scrimp.Int4Weight.from_codes(torch.arange(16).repeat(2, 1), torch.tensor([[1.0], [0.5]]))
    >>> channels = Int4Channels.of(weight)
    >>> channels, channels.codes[3].nonzero().flatten().tolist(), torch.equal(channels.weight().codes(), weight.codes())
    (Int4Channels(N=2, K=16, group_size=16, none8), [0, 1], True)
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    permutation: Tensor | None = None
    group_size: int = 128
    zero_kind: ZeroKind = "none8"
    in_features: int = -1

    def __post_init__(self) -> None:
        tensors: dict[str, Any] = self.tensors()
        check_channels("Int4Channels", **tensors, group_size=self.group_size, zero_kind=self.zero_kind)
        if self.in_features == -1:
            object.__setattr__(self, "in_features", self.columns)

    @classmethod
    def of(cls, weight: Int4Weight) -> Int4Channels:
        """The weight, turned: a copy."""
        K, tiles = weight.columns, -(-weight.out_features // TILE)
        codes = torch.nn.functional.pad(weight.codes(), (0, 0, 0, -weight.out_features % TILE))
        pairs = codes.view(tiles, 4, 2, 4, 4, K).permute(5, 0, 3, 1, 4, 2)  # [K, tile, a, r, i, nibble]
        turned = [None if t is None else t.T.contiguous() for t in (weight.scales, weight.zeros)]
        return cls(
            pack_nibbles(pairs).reshape(K, tiles * TILE // 2),
            turned[0],  # type: ignore[arg-type]
            turned[1],
            weight.codebook,
            weight.permutation,
            weight.group_size,
            weight.zero_kind,
            weight.in_features,
        )

    def weight(self) -> Int4Weight:
        """The weight in its canonical form: a copy."""
        codes = unpack_channels(self.codes, self.out_features)
        turned = [None if t is None else t.T.contiguous() for t in (self.scales, self.zeros)]
        rest: Any = (self.codebook, self.permutation, self.group_size, self.zero_kind, self.in_features)
        return Int4Weight(pack_nibbles(codes), turned[0], turned[1], *rest)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, None for those that this weight does without."""
        return {
            "codes": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
            "codebook": self.codebook,
            "permutation": self.permutation,
        }

    def numbers(self) -> tuple[int, int]:
        """group_size, and zero_kind as an index of ZERO_KINDS."""
        return self.group_size, ZERO_KINDS.index(self.zero_kind)

    @property
    def out_features(self) -> int:
        """Outputs N."""
        return self.scales.shape[1]

    @property
    def columns(self) -> int:
        """Channels K of the codes; more than inputs where the permutation names one more than once."""
        return self.codes.shape[0]

    def to(self, device: torch.device | str) -> Int4Channels:
        """With its tensors on `device`."""
        moved = {name: None if value is None else value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values() if tensor is not None)

    def __repr__(self) -> str:
        sizes = f"N={self.out_features}, K={self.columns}, group_size={self.group_size}"
        return f"Int4Channels({sizes}, {self.zero_kind})"


def unpack_channels(codes: Tensor, outputs: int) -> Tensor:
    """Codes of `Int4Channels` -> uint8 `[outputs, K]` of 0 to 15."""
    K, tiles = codes.shape[0], 2 * codes.shape[1] // TILE
    pairs = unpack_nibbles(codes.reshape(K, tiles, 4, 4, 4, 1))  # [K, tile, a, r, i, nibble]
    return pairs.permute(1, 3, 5, 2, 4, 0).reshape(tiles * TILE, K)[:outputs]
