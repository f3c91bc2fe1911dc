"""Plain torch operators, one after the other."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from scrimp import Int4Weight

from ..registry import Peer

DISTRIBUTION = "torch"


def available() -> str | None:
    """Always there."""
    return None


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes: no case of empty rows, no layout of its own."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - lse).unsqueeze(-1), torch.exp(lse_b - lse).unsqueeze(-1)
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Peer:
    """Six operators, two of them over the outputs."""
    return Peer(lambda: merge(out_a, lse_a, out_b, lse_b))


def exact_head(x: Tensor, heads: Iterator[Tensor], k: int) -> Peer:
    """The dense head and topk."""
    return Peer(lambda: functional.linear(x, next(heads)).topk(k))


def codebook_topk(x: Tensor, turns: Iterator[Tensor], k: int) -> Peer:
    """All scores, topk, a gather and its mean; scores that round alike (bf16) may choose other codes."""

    def call() -> Tensor:
        codebook = next(turns)
        return codebook[(x @ codebook.T).topk(k).indices].mean(1)

    return Peer(call, same=x.dtype == torch.float32)


def linear(x: Tensor, turns: Iterator[list[Tensor]], added: Tensor | None) -> Peer:
    """One F.linear for each weight, as a model calls them; their results stay apart."""

    def call() -> list[Tensor]:
        parts = [functional.linear(x, weight) for weight in next(turns)]
        return parts if added is None else [part + added for part in parts]

    return Peer(call, same=len(call()) == 1)


@lru_cache(maxsize=1)
def dense(weight: Int4Weight, dtype: torch.dtype) -> Iterator[Tensor]:
    """Copies of the matrix."""
    from ..int4_linear import cold

    matrix = weight.dequantize(dtype)
    return cold(matrix.clone, matrix.nbytes)


def int4_linear(x: Tensor, weight: Int4Weight) -> Peer:
    """F.linear with the dequantized weight."""
    turns = dense(weight, x.dtype)
    return Peer(lambda: functional.linear(x, next(turns)))


def sparse_linear(x: Tensor, turns: Iterator[Tensor]) -> Peer:
    """F.linear with all channels."""
    return Peer(lambda: functional.linear(x, next(turns)), same=False)


def channel_select(x: Tensor, level: Tensor, norms: Tensor, rule: str) -> Peer:
    """What a user writes: a mask by each rule, masked rows, and the list of the channels that any row keeps."""

    def keep(score: Tensor) -> Tensor:
        if rule == "threshold":
            return score > level
        if rule == "relative":
            return score > level * score.mean(-1, keepdim=True)
        ranked, order = score.sort(dim=-1, descending=True)
        if rule == "top_k":
            first = torch.arange(score.shape[-1]) < level
        else:
            energy = ranked.square().cumsum(-1)
            first = energy - ranked.square() < level * energy[:, -1:]
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, first.expand_as(score))

    def call() -> tuple[Tensor, Tensor]:
        kept = keep((x * norms).abs())
        return x.where(kept, 0), kept.any(0).nonzero()

    return Peer(call, same=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Peer:
    """F.rms_norm, which rounds once where Llama rounds twice."""
    return Peer(lambda: functional.rms_norm(x, weight.shape, weight, eps))


def silu_mul(gate: Tensor, up: Tensor) -> Peer:
    """Two operators."""
    return Peer(lambda: functional.silu(gate) * up)


def gelu_mul(gate: Tensor, up: Tensor) -> Peer:
    """Two operators."""
    return Peer(lambda: functional.gelu(gate, approximate="tanh") * up)


def tree_accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
) -> Peer:
    """The argmax of every row, drawn by Gumbel noise of torch's own generator where hot, then a walk in Python."""

    def call() -> list[list[int]]:
        scores = logits.float()
        if float(temperature[0]) > 0:
            scores = scores / temperature[:, None, None] - torch.empty_like(scores).exponential_().log()
        best, above, held = (x.tolist() for x in (scores.argmax(-1), parents, tokens))
        paths = []
        for wanted, up, own in zip(best, above, held, strict=True):
            path, row = list[int](), 0
            while row >= 0:
                path.append(row)
                row = next((t for t in range(len(own)) if up[t] == row and own[t] == wanted[row]), -1)
            paths.append(path)
        return paths

    return Peer(call, same=False)


def kv_compact(cache: Tensor, start: Tensor, path: Tensor) -> Peer:
    """A gather into a temporary and a copy back, as Medusa and EAGLE do it; one sequence."""
    count = int((path[0] >= 0).sum())
    first, slots = int(start[0]), (start[0] + path[0, :count]).long()

    def call() -> None:
        cache[:, 0, :, first : first + count] = cache[:, 0].index_select(2, slots)

    return Peer(call, same=False)


def rotate_half(x: Tensor) -> Tensor:
    """transformers' way to say it."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    start: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """transformers' apply_rotary_pos_emb, its tables in the dtype of q, and the update of a static cache."""
    rows = positions.long()
    cos, sin = (table[rows].to(q.dtype).unsqueeze(1) for table in (cos, sin))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    slots = torch.arange(q.shape[2]) + start
    k_cache.index_copy_(2, slots, k * cos + rotate_half(k) * sin)
    v_cache.index_copy_(2, slots, v)
    return q * cos + rotate_half(q) * sin


def rotary_append(*args: Tensor) -> Peer:
    """Some twenty operators."""
    return Peer(lambda: append(*args))


def vq_logits(h: Tensor, heads: Iterator[tuple[Tensor, Tensor]], matrices: Iterator[Tensor]) -> Peer:
    """The product with the codebook, and a copy of each token's score."""

    def call() -> Tensor:
        codebook, codes = next(heads)
        return functional.linear(h, codebook).index_select(-1, codes)

    return Peer(call)


def chosen(logits: Tensor, heat: float, top_p: float) -> Tensor:
    """A token for each row, drawn by torch's own generator where hot; top_p as in transformers."""
    if heat == 0:
        return logits.argmax(-1)
    logits = logits / heat
    if top_p < 1:
        values, order = logits.sort(-1)
        out = values.softmax(-1).cumsum(-1) <= 1 - top_p
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def vq_sample(
    h: Tensor, heads: Iterator[tuple[Tensor, Tensor]], matrices: Iterator[Tensor], heat: float, top_p: float
) -> Peer:
    """The scattered logits, and a choice from them."""
    logits = vq_logits(h, heads, matrices).call
    return Peer(lambda: chosen(logits(), heat, top_p), same=False)
