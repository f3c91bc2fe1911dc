"""Pictures of an attention plan: which part of the causal triangle one head reads."""

import base64
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch

from .. import SparsePlan

CELLS = 128


@dataclass(frozen=True)
class Picture:
    """One head's plan, down-sampled.

    Args:
        layer, head: which head.
        density: share of the visible (query, key) pairs that are read.
        cells: [rows, columns] fp32 in 0..1, queries down, keys to the right: the share read of the
            visible pairs in each area.
    """

    layer: int
    head: int
    density: float
    cells: torch.Tensor


def picture(plan: SparsePlan, layer: int, head: int, cells: int = CELLS) -> Picture:
    """The picture of one head of the first sequence of a plan."""
    one = plan.select(batch=[0], heads=[head])
    visible = _visible(plan.n_q, plan.n_k, plan.causal, plan.q_offset, cells)
    read = _pool(one.to_mask()[0, 0], cells)
    return Picture(layer, head, float(one.density()), read / visible.clamp(min=1))


def choose(plans: dict[int, SparsePlan], count: int) -> list[tuple[int, int]]:
    """`count` (layer, head) of all layers from the sparsest to the densest, evenly spaced."""
    everyone = sorted(
        (density, layer, head)
        for layer, plan in plans.items()
        for head, density in enumerate(torch.as_tensor(plan.density(per_head=True))[0].tolist())
    )
    spacing = (len(everyone) - 1) / max(1, count - 1)
    places = sorted({round(place * spacing) for place in range(count)}) if everyone else []
    return [everyone[place][1:] for place in places]


def png_data_uri(cells: torch.Tensor, colour: tuple[int, int, int]) -> str:
    """A PNG of values in 0..1 as a data URI: one colour, its opacity the value, for any page."""
    height, width = cells.shape
    levels = (cells.clamp(0, 1) * 255).round().to(torch.uint8)
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in levels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(colour) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


@lru_cache
def _visible(n_q: int, n_k: int, causal: bool, q_offset: int, cells: int) -> torch.Tensor:
    whole = SparsePlan.dense(n_q, n_k, causal=causal, q_offset=q_offset)
    return _pool(whole.to_mask()[0, 0], cells)


def _pool(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """How many entries of a mask [n_q, n_k] are set in each of at most cells x cells areas, fp32."""
    rows, columns = (-(-size // cells) for size in mask.shape)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % columns, 0, -mask.shape[0] % rows))
    by_rows = padded.unflatten(0, (-1, rows)).sum(1, dtype=torch.int32)
    return by_rows.unflatten(1, (-1, columns)).sum(2).float()
