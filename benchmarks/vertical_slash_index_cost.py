"""What vertical_slash_index's kernels do: the sampled rows of a few segments meet the keys before them twice.

How often the search for the best columns reads a segment's scores depends on them: those of all keys `READS` times, a
short list of the best `LIST_READS` times. So bytes are an estimate, where products and exponentials are exact.
"""

from dataclasses import dataclass

import torch
from scrimp.kernels.launch import cdiv, power_of_two
from scrimp.kernels.tuning import config
from torch import Tensor

from .roofline import Count, CountedCase

# Means of Gaussian queries and keys, 100 and 1,000 columns of 8K and 64K keys: 2 to 6 reads, then 0 to 9 of the list.
READS, LIST_READS, LIST = 3, 6, 1.5  # the list holds so many times the columns that are wanted


@dataclass(frozen=True)
class Call:
    """The op's flat arguments, and what its launch makes of them."""

    q: Tensor
    k: Tensor
    window: Tensor
    columns: Tensor
    max_columns: int
    sinks: int
    segment: int
    samples: int
    q_block: int
    q_offset: int
    scale: float

    @property
    def segments(self) -> int:
        return cdiv(self.q.shape[2], self.segment)

    @property
    def tile(self) -> tuple[int, int, int]:
        """Keys and rows of a tile of scores, and how many of its rows belong to one segment."""
        B, H, n_q, D = self.q.shape
        chosen = config("vertical_slash_index", self.q.device, head_dim=max(D, 1), segments=B * H * self.segments)
        keys, rows = (32, 16) if self.q.dtype == torch.float32 else (chosen["BLOCK_K"], chosen["ROWS"])
        return keys, rows, min(max(power_of_two(min(self.samples, n_q)), rows // 4), rows)

    @property
    def programs(self) -> int:
        """The most there are; each has a workspace."""
        B, H, _, D = self.q.shape
        return config("vertical_slash_index", self.q.device, head_dim=max(D, 1), segments=B * H * self.segments)[
            "programs"
        ]

    def low(self, row: int, window: int) -> int:
        """First key of the window of the row's tile, 0 where it would touch the sinks."""
        low = min(max(row // self.q_block * self.q_block + self.q_offset - window, 0), self.k.shape[2])
        return low if low > self.sinks else 0

    def stop(self, segment: int) -> int:
        """The query behind a segment."""
        return min((segment + 1) * self.segment, self.q.shape[2])

    def rows(self, segment: int) -> list[int]:
        """A segment's sampled queries; none of one behind the last."""
        step, start, stop = self.segment // self.samples, segment * self.segment, self.stop(segment)
        return [min(row, stop - 1) for row in range(start + step - 1, stop + step - 1, step)]


def count(*flat: object) -> Count:
    """Of one call; the budgets `window` and `columns` have values, q and k may be on the meta device."""
    call = Call(*flat)  # type: ignore[arg-type]
    B, H, n_q, _ = call.q.shape
    written = B * H * (32 * cdiv(n_q, call.q_block) + 4 * call.segments * call.max_columns)
    done = Count(bytes=written + 8 * H * min(n_q, 1), unique_bytes=written + 8 * H * min(n_q, 1))
    if not written or not call.max_columns or not call.k.shape[2]:
        return Count(written, written)
    group_heads, scored = H // call.k.shape[1], 0
    for h, (window, wanted) in enumerate(zip(call.window.tolist(), call.columns.tolist(), strict=True)):
        limit = call.low(n_q - 1, window) if wanted else 0
        scored += B * (limit > 0)
        for _ in range(B):
            done += count_head(call, window, min(wanted, call.max_columns))
        if h % group_heads == 0:  # all keys that some head of the group meets, once
            some = any(
                c and call.low(n_q - 1, w)
                for w, c in zip(
                    call.window[h : h + group_heads].tolist(), call.columns[h : h + group_heads].tolist(), strict=True
                )
            )
            seen = min(max(n_q + call.q_offset, 0), call.k.shape[2]) * some
            done += Count(0, B * seen * call.q.shape[3] * call.k.element_size())
    return done + workspaces(call, scored)


def workspaces(call: Call, scored: int) -> Count:
    """What the scores of all programs take, and all keys: programs of all heads run at the same time."""
    _, rows, samples = call.tile
    together, n_k = rows // samples, call.k.shape[2]
    scores = 4 * together * n_k * min(call.programs, scored * cdiv(call.segments, together))
    return Count(0, scores, resident_bytes=scores + call.k.numel() * call.k.element_size() if scored else 0)


def count_head(call: Call, window: int, wanted: int) -> Count:
    """Of the columns of one head of one sequence."""
    keys, rows, samples = call.tile
    together, D, size = rows // samples, call.q.shape[3], call.q.element_size()
    done = Count(0, 0)
    for first in range(0, call.segments, together):
        members = range(first, min(first + together, call.segments))
        limit = call.low(call.stop(members[-1]) - 1, window)
        if not wanted or not limit:
            continue
        start = call.sinks // keys * keys
        width = cdiv(limit, keys) * keys - start
        for chunk in range(0, max(min(call.samples, call.q.shape[2]), 1), samples):
            picked = [row for s in members for row in call.rows(s)[chunk : chunk + samples] if call.low(row, window)]
            end = max([min(max(row + call.q_offset + 1, 0), call.k.shape[2]) for row in picked], default=0)
            tiles, again = cdiv(end, keys), width // keys
            read = min(tiles * keys, call.k.shape[2]) + min(start + width, call.k.shape[2]) - start
            scores = 4 * together * width * (2 if chunk else 1)
            elements = keys * rows
            useful = sum(row + call.q_offset + 1 + call.low(row, window) - call.sinks for row in picked)
            done += Count(
                bytes=size * D * (len(picked) + read) + scores,
                unique_bytes=size * D * len(picked),
                flops_issued=2 * elements * power_of_two(D, 16) * (tiles + again),
                flops_useful=2 * D * min(useful, elements * (tiles + again)),
                exps=elements * (tiles + again + 1),
            )
        done += count_choices(call, members, limit, wanted, window)
    return done


def count_choices(call: Call, members: range, limit: int, wanted: int, window: int) -> Count:
    """Of the search for the best columns of some segments, the columns and the slices."""
    chosen = min(wanted, limit)
    read = sum(4 * max(call.low(call.stop(s) - 1, window) - call.sinks, 0) * READS for s in members)
    tiles = cdiv(call.segment, call.q_block)
    listed = int(LIST * chosen) * (8 + 4 * LIST_READS + 8)  # bits and keys are written, searched, and read to be copied
    written = len(members) * (listed + 4 * chosen * (1 + cdiv(tiles, 16)) + 8 * tiles)
    return Count(bytes=read + written, unique_bytes=0)


def cases() -> list[CountedCase]:
    """Llama-3-8B-like heads in bfloat16, 1,000 columns and a window of 1,024 tokens in every head."""

    def make(n: int) -> CountedCase:
        q, k = (torch.empty(1, heads, n, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
        window, columns = (torch.full((32,), value, dtype=torch.int32) for value in (1024, 1000))
        args = (q, k, window, columns, 1000, 16, 512, 16, 64, 0, 128**-0.5)
        fields = {"n": n, "heads": 32, "kv_heads": 8, "head_dim": 128, "columns": 1000, "window": 1024}
        return CountedCase(f"{n // 1024}k-d128", "bf16", lambda: count(*args), fields)

    return [make(1024 * thousands) for thousands in (8, 32, 128)]
