"""Int4Weight: the one canonical form of a 4-bit weight matrix, whatever quantized it or wrote its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .check import ZERO_KINDS, check_finite, check_layout, check_permutation
from .pack import pack_nibbles, unpack_nibbles

FORMAT_VERSION = 1
ZeroKind = Literal["none8", "uint8", "float", "offset"]


@dataclass(frozen=True, eq=False, repr=False)
class Int4Weight:
    """A matrix `[N, in_features]` of 4-bit codes with one scale for every `group_size` neighbours of a row.

    With code q, scale s and zero z of its group, zero_kind says what a code means:

        none8   w = (q - 8) s, or codebook[q] s where there is a codebook
        uint8   w = (q - z) s, z one byte a group
        float   w = (q - z) s, z of the scales' dtype
        offset  w = q s + z,   z of the scales' dtype

    qweight      uint8 [N, K/2]    codes, column 2j in the low nibble of byte j, column 2j + 1 in the high one
    scales       fp16, bf16 or fp32 [N, K / group_size], finite
    zeros        [N, K / group_size], finite; None for none8
    codebook     [16], int8 or fp32, finite; None
    permutation  int32 [K]: column j multiplies input permutation[j]; None: input j
    group_size   16, 32, 64, 128 or K; K is a multiple of it and even
    in_features  K; less where the permutation names an input more than once: then its columns add up. Weights
                 of 8 bits are held so, as two columns an input (q = 16 q_high + q_low).

    The initialiser checks shapes, types and devices; `validate` reads the tensors too, as every reader does.

    >>> import torch, scrimp
    >>> weight = scrimp.Int4Weight.from_codes(torch.arange(16).repeat(2, 1), torch.tensor([[1.0], [0.5]]))
    >>> weight, weight.dequantize()[1, :4].tolist()
    (Int4Weight(N=2, K=16, group_size=16, none8, scales=float32), [-4.0, -3.5, -3.0, -2.5])
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None
    permutation: Tensor | None = None
    group_size: int = 128
    zero_kind: ZeroKind = "none8"
    in_features: int = -1

    def __post_init__(self) -> None:
        tensors: dict[str, Any] = self.tensors()
        check_layout("Int4Weight", **tensors, group_size=self.group_size, zero_kind=self.zero_kind)
        K = self.columns
        if self.in_features == -1:
            object.__setattr__(self, "in_features", K)
        if self.in_features != K and (self.permutation is None or not 0 < self.in_features < K):
            why = "no permutation" if self.permutation is None else "a permutation of them"
            raise ValueError(f"Int4Weight: in_features={self.in_features}, but the codes have {K} columns and {why}")

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        zero_kind: ZeroKind | None = None,
        codebook: Tensor | None = None,
        permutation: Tensor | None = None,
        in_features: int = -1,
    ) -> Int4Weight:
        """The validated weight of integer codes `[N, K]` in 0 to 15 and scales `[N, groups]`.

        `zero_kind` is none8 without zeros, uint8 for uint8 zeros and float for floating ones unless given;
        group_size is K / groups.

        Raises: ValueError for a code outside 0 to 15 (named) and as `validate`.
        """
        if codes.dim() != 2 or codes.dtype.is_floating_point or codes.shape[1] % 2:
            raise ValueError(f"Int4Weight: codes must be integers [N, even], got {codes.dtype} {list(codes.shape)}")
        outside = (codes < 0) | (codes > 15)
        if bool(outside.any()):
            n, k = outside.nonzero()[0].tolist()
            raise ValueError(f"Int4Weight: codes[{n}, {k}] is {int(codes[n, k])}; it must be 0 to 15")
        if scales.dim() != 2 or scales.shape[1] == 0 or codes.shape[1] % scales.shape[1]:
            raise ValueError(f"Int4Weight: scales {list(scales.shape)} do not divide {codes.shape[1]} columns")
        if zero_kind is None:
            zero_kind = "none8" if zeros is None else "uint8" if zeros.dtype == torch.uint8 else "float"
        packed, group_size = pack_nibbles(codes.to(torch.uint8)), codes.shape[1] // scales.shape[1]
        return cls(packed, scales, zeros, codebook, permutation, group_size, zero_kind, in_features).validate()

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, None for those that this weight does without."""
        return {
            "qweight": self.qweight,
            "scales": self.scales,
            "zeros": self.zeros,
            "codebook": self.codebook,
            "permutation": self.permutation,
        }

    @property
    def out_features(self) -> int:
        """Rows N."""
        return self.qweight.shape[0]

    @property
    def columns(self) -> int:
        """Columns K of codes in a row."""
        return 2 * self.qweight.shape[1]

    def codes(self) -> Tensor:
        """The codes, uint8 `[N, K]` of 0 to 15, in the order of the columns."""
        return unpack_nibbles(self.qweight)

    def validate(self, who: str = "Int4Weight") -> Int4Weight:
        """Reads the tensors and returns the weight.

        Raises: ValueError, beginning with `who`, for a scale, zero or codebook entry that is not finite and for a
        permutation that names an input outside `[0, in_features)` or leaves one out. Each names the entry.
        """
        for name, tensor in self.tensors().items():
            if tensor is not None and tensor.is_floating_point():
                check_finite(who, name, tensor)
        if self.permutation is not None:
            check_permutation(who, self.permutation, self.in_features)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix `[N, in_features]`: computed in fp32 (fp64 if `dtype` is), then rounded to `dtype`."""
        weights = self.dequantize_columns(torch.float64 if dtype == torch.float64 else torch.float32)
        if self.permutation is not None:
            empty = weights.new_zeros(self.out_features, self.in_features)
            weights = empty.index_add_(1, self.permutation, weights)
        return weights.to(dtype)

    def dequantize_columns(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[N, K]` in the order of the columns, every step rounded to `dtype`."""
        codes, groups = self.codes(), (*self.scales.shape, self.group_size)
        scales = self.scales.to(dtype).unsqueeze(-1)
        if self.zeros is not None:
            zeros = self.zeros.to(dtype).unsqueeze(-1)
            q = codes.to(dtype).view(groups)
            return (q * scales + zeros if self.zero_kind == "offset" else (q - zeros) * scales).view(codes.shape)
        q = codes.to(dtype) - 8 if self.codebook is None else self.codebook.to(dtype)[codes.int()]
        return (q.view(groups) * scales).view(codes.shape)

    def to(self, device: torch.device | str) -> Int4Weight:
        """The weight with its tensors on `device`."""
        moved = {name: None if value is None else value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors that are there, and `format`: int64 (version, group_size, zero_kind, in_features)."""
        numbers = (FORMAT_VERSION, self.group_size, ZERO_KINDS.index(self.zero_kind), self.in_features)
        present = {prefix + name: value for name, value in self.tensors().items() if value is not None}
        return present | {f"{prefix}format": torch.tensor(numbers, dtype=torch.int64)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "", who: str = "Int4Weight") -> Int4Weight:
        """The weight of `state_dict`, validated; other entries of `state` are not looked at.

        Raises: ValueError, beginning with `who`, for a missing entry, another version and whatever does not fit.
        """
        for name in ("format", "qweight", "scales"):
            if prefix + name not in state:
                raise ValueError(f"{who}: there is no tensor {prefix + name!r}")
        numbers = state[f"{prefix}format"]
        if numbers.dtype != torch.int64 or numbers.dim() != 1 or numbers.numel() < 1:
            raise ValueError(f"{who}: {prefix}format must be int64 [4], got {numbers.dtype} {list(numbers.shape)}")
        version, *sizes = numbers.tolist()
        if version != FORMAT_VERSION:
            raise ValueError(f"{who}: {prefix}format is version {version}; this scrimp reads {FORMAT_VERSION}")
        if len(sizes) != 3 or not 0 <= sizes[1] < len(ZERO_KINDS):
            raise ValueError(f"{who}: {prefix}format is {numbers.tolist()}, not (1, group_size, zero_kind 0-3, inputs)")
        group_size, kind, in_features = sizes
        found = {name: state.get(prefix + name) for name in ("qweight", "scales", "zeros", "codebook", "permutation")}
        named = f"{who}: {prefix.rstrip('.')}" if prefix else who
        try:
            weight = cls(**found, group_size=group_size, zero_kind=ZERO_KINDS[kind], in_features=in_features)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from error
        return weight.validate(named)

    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values() if tensor is not None)

    def __repr__(self) -> str:
        extras = [name for name in ("codebook", "permutation") if getattr(self, name) is not None]
        if self.in_features != self.columns:
            extras.append(f"in_features={self.in_features}")
        where = [] if self.qweight.device.type == "cpu" else [f"device={self.qweight.device}"]
        scales = f"scales={str(self.scales.dtype).removeprefix('torch.')}"
        sizes = [f"N={self.out_features}", f"K={self.columns}", f"group_size={self.group_size}"]
        return f"Int4Weight({', '.join([*sizes, self.zero_kind, scales, *extras, *where])})"
