"""tree_attention: one token is bound by reading the cache, many rows by arithmetic."""

from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Work

COLD_BYTES = 2**28  # every call takes the next copy of the cache, as a model's layers do; copies have so many bytes
# query heads, key/value heads, head size
MODELS = {"smollm2": (9, 3, 64), "8b": (32, 8, 128), "mha": (8, 8, 64)}
FP32, BF16 = torch.float32, torch.bfloat16


def cases() -> list[Case]:
    """The demo model's heads from 1K to 32K tokens, an 8B model's, and heads that share nothing."""
    found = [case("smollm2", n, T, dtype) for dtype in (FP32, BF16) for n in (1000, 8000) for T in (1, 8, 64)]
    found += [case("smollm2", 32000, T) for T in (1, 64)]
    found += [case("8b", 4000, T, dtype) for dtype in (FP32, BF16) for T in (1, 16, 64)]
    return [*found, case("mha", 4000, 1)]


def case(model: str, prefix: int, T: int, dtype: torch.dtype = FP32) -> Case:
    """One sequence of `prefix` cached tokens and a tree of T new ones."""
    H, G, D = MODELS[model]
    fields = {"m": T, "batch": 1, "heads": H, "kv_heads": G, "n": prefix, "head_dim": D}
    # "self-unmasked": the chain of as many tokens; "self-1-row": below 1 by what more rows cost
    peers = ("sdpa",) if T == 1 else ("sdpa", "self-unmasked", "self-1-row")
    return Case("tree_attention", f"{model}-{prefix}-{T}", dtype, fields, peers, partial(problem, fields, dtype))


def tree(T: int) -> Tensor:
    """int64 `[1, T]`: ancestor words of a tree such as drafts make: a long first chain with branches."""
    words = [1]
    for t in range(1, T):
        parent = t - 1 if t % 4 else int(torch.randint(max(0, t - 8), t, ()))
        words.append(words[parent] | 1 << t)
    return torch.tensor([[word - (1 << 64) if word >> 63 else word for word in words]])


def problem(fields: dict[str, int], dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit; the limit reads every cached key and value once."""
    T, H, G, n, D = (fields[name] for name in ("m", "heads", "kv_heads", "n", "head_dim"))
    q = torch.randn(1, T, H, D).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, G, n + T, D).to(dtype) for _ in range(2))
    prefix, words = torch.tensor([n], dtype=torch.int32), tree(T)
    turns = cycle([(k.clone(), v.clone()) for _ in range(COLD_BYTES // (k.nbytes + v.nbytes) + 2)])

    def ours(q: Tensor, words: Tensor | None) -> Call:
        return lambda: scrimp.ops.tree_attention(q, *next(turns), prefix, words)

    pairs = H * (T * n + words.numel())
    return Problem(
        inputs=(q, turns, n, words),
        ours=ours(q, words),
        check=lambda got: check(got, q, k, v, prefix, words),
        work=Work(bytes=k.nbytes + v.nbytes + 2 * q.nbytes, flops=4 * D * pairs),
        own={"self-unmasked": ours(q, None), "self-1-row": ours(q[:, :, :1], None)},
        fields={"plan": "tree"},
    )


def check(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, words: Tensor) -> None:
    """The first and the last group of heads against the oracle: heads do not depend on each other."""
    G = k.shape[1]
    groups = sorted({0, G - 1})

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (G, -1))[:, groups].flatten(1, 2)

    args = (heads(q), k[:, groups], v[:, groups], prefix, words, 0, q.shape[3] ** -0.5)
    assert_matches_oracle([heads(x) for x in got], OPS["tree_attention"].reference, *args, names=("out", "lse"))


def tiny() -> Call:
    """A call that is all overhead."""
    q, cache, prefix = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 2, 8), torch.tensor([1], dtype=torch.int32)
    return lambda: scrimp.ops.tree_attention(q, cache, cache, prefix)
