"""The data type behind SparsePlan: its tensors, views of them and what can be read off them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from . import build, measure
from .build import Geometry


@dataclass(frozen=True, eq=False, repr=False)
class PlanData:
    """Fields and methods of a SparsePlan that do not depend on how it was made."""

    ranges: Tensor
    range_slice: Tensor
    columns: Tensor
    column_slice: Tensor
    q_block: int
    n_q: int
    n_k: int
    q_offset: int
    causal: bool
    row_start: Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        ranges: Tensor,
        range_slice: Tensor,
        columns: Tensor,
        column_slice: Tensor,
        row_start: Tensor | None = None,
        *,
        n_q: int,
        n_k: int | None = None,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
    ) -> Self:
        """A plan of the user's own tensors (shapes in the class docstring), validated.

        Raises: TypeError, ValueError as `validate`.

        >>> r, s = torch.tensor([[[[0, 2]]]]).int(), torch.tensor([[[[0, 1]]]]).int()
        >>> SparsePlan.from_tensors(r, s, r[..., 0, :0], s * 0, n_q=4).to_mask().sum().item()
        7
        """
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, "cpu")
        sizes = (geo.q_block, geo.n_q, geo.n_k, geo.q_offset, geo.causal)
        return cls(ranges, range_slice, columns, column_slice, *sizes, row_start).validate()

    @classmethod
    def _of(
        cls,
        geo: Geometry,
        ranges: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor] | None = None,
        row_start: Tensor | None = None,
    ) -> Self:
        """From (counts [B, H, T], values [E, 2]) of ranges and the (buffer, slices) of columns."""
        buffer, slices = build.csr(*ranges)
        if columns is None:
            columns = buffer.new_zeros((*buffer.shape[:2], 0)), torch.zeros_like(slices)
        return cls(buffer, slices, *columns, geo.q_block, geo.n_q, geo.n_k, geo.q_offset, geo.causal, row_start)

    @classmethod
    def cat(cls, plans: Sequence[Self], dim: Literal["heads", "batch"] = "heads") -> Self:
        """One plan of several: their heads (or their sequences) one after the other.

        All must agree in n_q, n_k, q_offset, causal and q_block; heads share one row_start, so plans joined along
        heads must agree in it too. A plan for one head stands for one.

        >>> SparsePlan.cat([SparsePlan.dense(256), SparsePlan.a_shape(256, 4, 32)]).heads
        2
        """
        if not plans:
            raise ValueError("SparsePlan: cat needs at least one plan")
        if dim not in ("heads", "batch"):
            raise ValueError(f"SparsePlan: cat dim={dim!r} must be 'heads' or 'batch'")
        for index, plan in enumerate(plans):
            if plan.geometry != plans[0].geometry:
                raise ValueError(f"SparsePlan: cat: plan {index} is {plan.geometry}, plan 0 is {plans[0].geometry}")
        axis, other = (1, 0) if dim == "heads" else (0, 1)
        shared = {plan.ranges.shape[other] for plan in plans} - {1}
        if len(shared) > 1:
            raise ValueError(f"SparsePlan: cat along {dim}: other sizes differ: {sorted(shared)}")
        size = shared.pop() if shared else 1
        plans = [plan.expand(**{"heads" if other else "batch": size}) for plan in plans]
        join = functools.partial(build.join, axis=axis)
        return dataclasses.replace(
            plans[0],
            ranges=join([plan.ranges for plan in plans]),
            range_slice=join([plan.range_slice for plan in plans]),
            columns=join([plan.columns for plan in plans]),
            column_slice=join([plan.column_slice for plan in plans]),
            row_start=cls._join_row_starts(plans, dim),
        )

    @staticmethod
    def _join_row_starts(plans: Sequence[PlanData], dim: str) -> Tensor | None:
        if all(plan.row_start is None for plan in plans):
            return None
        starts = [plan.row_starts().expand(plan.batch, -1) for plan in plans]
        if dim == "batch":
            return torch.cat(starts)
        for index, start in enumerate(starts):
            if not torch.equal(start, starts[0]):
                b, i = (start != starts[0]).nonzero()[0].tolist()
                raise ValueError(
                    f"SparsePlan: cat along heads: row_start[{b}, {i}] is {int(start[b, i])} in plan {index} and "
                    f"{int(starts[0][b, i])} in plan 0, but heads share it (a_shape with sink=0 is a window without it)"
                )
        return starts[0]

    def row_starts(self) -> Tensor:
        """`row_start`, or zeros int32 [1, n_q] where there is none."""
        if self.row_start is not None:
            return self.row_start
        return torch.zeros(1, self.n_q, dtype=torch.int32, device=self.ranges.device)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(
            self,
            ranges=change(self.ranges),
            range_slice=change(self.range_slice),
            columns=change(self.columns),
            column_slice=change(self.column_slice),
        )

    def expand(self, *, batch: int | None = None, heads: int | None = None) -> Self:
        """The same plan for `batch` sequences or `heads` heads, where it has one for all.

        >>> SparsePlan.dense(64).expand(heads=9).heads
        9
        """
        sizes = []
        for axis, (word, size) in enumerate((("batch", batch), ("heads", heads))):
            mine = self.ranges.shape[axis]
            if size is not None and mine not in (1, build.check_int(word, size, 0)):
                raise ValueError(f"SparsePlan: cannot expand {word} from {mine} to {size}")
            sizes.append(mine if size is None else size)
        return self._map(lambda x: x.expand(*sizes, *x.shape[2:]).contiguous())

    def select(
        self,
        *,
        batch: slice | Sequence[int] | None = None,
        heads: slice | Sequence[int] | None = None,
    ) -> Self:
        """The plan of some sequences or heads; an axis of 1 (one plan for all) stays as it is.

        >>> SparsePlan.a_shape(64, 4, [8, 16, 32]).select(heads=[2, 0]).heads
        2
        """
        picked = self
        for axis, (word, index) in enumerate((("batch", batch), ("heads", heads))):
            size = self.ranges.shape[axis]
            if index is None or size == 1:
                continue
            listed = range(size)[index] if isinstance(index, slice) else index
            order = [build.check_int(word, item, 0, size - 1) for item in listed]
            at = torch.tensor(order, dtype=torch.int64, device=self.ranges.device)
            picked = picked._map(functools.partial(torch.index_select, dim=axis, index=at))
            if word == "batch" and picked.row_start is not None and picked.row_start.shape[0] > 1:
                picked = dataclasses.replace(picked, row_start=picked.row_start[at])
        return picked

    def to(self, device: torch.device | str) -> Self:
        """The plan with its tensors on `device`."""
        start = None if self.row_start is None else self.row_start.to(device)
        return dataclasses.replace(self._map(lambda x: x.to(device)), row_start=start)

    def with_padding(self, starts: Sequence[int] | Tensor) -> Self:
        """Left padding: sequence b sees no key before starts[b], its first real token.

        Only cuts: sinks and columns that lie in the padding are lost, not moved.

        >>> SparsePlan.dense(4).with_padding([0, 3]).to_mask().sum((1, 2, 3)).tolist()
        [10, 1]
        """
        pad = build.head_ints("starts", starts, self.ranges.device, self.n_k).view(-1, 1).int()
        wide = self.expand(batch=len(pad)) if len(pad) > 1 else self
        return dataclasses.replace(wide, row_start=wide.row_starts().maximum(pad))

    @property
    def batch(self) -> int:
        """Sequences, or 1 for a plan shared by all."""
        return self.ranges.shape[0]

    @property
    def heads(self) -> int:
        """Query heads, or 1 for a plan shared by all."""
        return self.ranges.shape[1]

    @property
    def tiles(self) -> int:
        """Query tiles T = ceil(n_q / q_block)."""
        return self.range_slice.shape[2]

    @property
    def geometry(self) -> Geometry:
        """The sizes without the tensors."""
        device = self.ranges.device
        return Geometry(self.n_q, self.n_k, self.q_offset, self.causal, self.q_block, device)

    def validate(self) -> Self:
        """Checks everything the class docstring says and returns the plan; reads the tensors once.

        Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or device, a slice outside its
        buffer, a range that is empty, out of [0, n_k], unsorted or overlapping, a column out of [0, n_k) or
        not increasing, a row_start out of [0, n_k]. Each names the entry and its values.
        """
        measure.check_layout(self)
        measure.check_content(self)
        return self

    def density(self, *, per_head: bool = False) -> float | Tensor:
        """Pairs (query, key) seen, over those the dense plan of this causality and offset sees.

        Exact, with no n x n tensor, in O(ranges log C) (row_start: plus O(n_q log(ranges C)) a head); float64 [B, H]
        if per_head, else their mean. 1.0 where the dense plan sees nothing.

        >>> SparsePlan.a_shape(4, sink=1, window=1, q_block=1).density()
        0.7
        """
        pairs = measure.tile_counts(self)[0].sum(-1)
        return _fraction(pairs, measure.dense_counts(self)[0].sum(), per_head)

    def executed_density(self, *, per_head: bool = False) -> float | Tensor:
        """Like `density`, with every key of a tile computed for all its rows, as tile kernels do.

        Counts rows x tile_cost over the same for the dense plan: pairs that causality masks inside a tile are
        counted in both. Differs from `density` by the diagonal tiles.

        >>> SparsePlan.sliding_window(128, 1).executed_density()
        0.6666666666666666
        """
        first, end = self.geometry.bounds()
        pairs = (self.tile_cost() * (end - first)).sum(-1)
        whole = (measure.dense_counts(self)[1] * (end - first)).sum()
        return _fraction(pairs, whole, per_head)

    def tile_cost(self) -> Tensor:
        """Distinct keys that at least one row of each tile sees: int64 [B, H, T]."""
        return measure.tile_counts(self)[1]

    def to_mask(self) -> Tensor:
        """bool [B, H, n_q, n_k]: query i sees key j. Quadratic in memory: for tests and pictures."""
        return measure.row_mask(self, 0, self.n_q)

    def same_pairs(self, other: PlanData) -> bool:
        """Whether both plans see the same (query, key) pairs, however they say it."""
        return measure.same_pairs(self, other)

    def bytes(self) -> int:
        """Memory of the tensors."""
        tensors = (self.ranges, self.range_slice, self.columns, self.column_slice, self.row_start)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __repr__(self) -> str:
        offset = f", q_offset={self.q_offset}" if self.q_offset != self.n_k - self.n_q else ""
        rows = "" if self.row_start is None else f", row_start={list(self.row_start.shape)}"
        where = "" if self.ranges.device.type == "cpu" else f", device={self.ranges.device}"
        return (
            f"SparsePlan(B={self.batch}, H={self.heads}, n_q={self.n_q}, n_k={self.n_k}{offset}, "
            f"{'causal' if self.causal else 'not causal'}, q_block={self.q_block}, "
            f"ranges={self.ranges.shape[2]}, columns={self.columns.shape[2]}{rows}{where})"
        )


def _fraction(pairs: Tensor, whole: Tensor, per_head: bool) -> float | Tensor:
    part = pairs.double() / whole if int(whole) else torch.ones_like(pairs, dtype=torch.float64)
    return part if per_head else float(part.mean())
