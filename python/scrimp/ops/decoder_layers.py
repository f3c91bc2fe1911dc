"""decoder_layers: layers of a Llama-like decoder on a few new rows, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._registry import OPS, register
from ._check import check_dtype

SCHEMA = (
    "(Tensor x, Tensor?[] norms, float[] eps, Tensor?[] linears, int[] formats, Tensor?[] selections, "
    "Tensor cos, Tensor sin, Tensor positions, Tensor start, Tensor prefix, Tensor? ancestors, "
    "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, int[] windows, int heads, int activation, float scale) -> Tensor"
)
OP = "decoder_layers"
MAX_ROWS = 64
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NORMS = 4  # of a layer: attention, q, k, mlp
PARTS = 7  # linear layers of a layer: q, k, v, o, gate, up, down
GROUPS = ((0, 3), (3, 4), (4, 6), (6, 7))  # parts of one input
TENSORS = 6  # of a part: weight, bias, scales, zeros, codebook, permutation
FORMAT = 3  # numbers of a part: group size (0: dense), zero kind, mode
SELECTION = 3  # tensors of a group: level (None: not sparse), scale, center
RELATIVE = 1  # the rule of channel_select
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check(
    x: Tensor,
    norms: Sequence[Tensor | None],
    eps: Sequence[float],
    linears: Sequence[Tensor | None],
    formats: Sequence[int],
    selections: Sequence[Tensor | None],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    windows: Sequence[int],
    heads: int,
    activation: int,
) -> None:
    layers = len(k_caches)
    if x.dim() != 3:
        raise ValueError(f"{OP}: x must be [B, T, d], got shape {list(x.shape)}")
    check_dtype(OP, "x", x, DTYPES)
    if x.shape[0] * x.shape[1] > MAX_ROWS:
        raise ValueError(f"{OP}: x has {x.shape[0] * x.shape[1]} rows; up to {MAX_ROWS} can be computed together")
    for name, found, each in (
        ("norms", len(norms), NORMS),
        ("eps", len(eps), NORMS),
        ("linears", len(linears), PARTS * TENSORS),
        ("formats", len(formats), PARTS * FORMAT),
        ("v_caches", len(v_caches), 1),
        ("windows", len(windows), 1),
    ):
        if found != layers * each:
            raise ValueError(f"{OP}: {name} has {found} entries; {layers} layers need {layers * each}")
    if selections and len(selections) != (wanted := layers * len(GROUPS) * SELECTION):
        raise ValueError(f"{OP}: {len(selections)} selections; {layers} layers need {wanted}, or none")
    if heads < 1:
        raise ValueError(f"{OP}: heads={heads} must be at least 1")
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(
            f"{OP}: activation={activation} must be 0 to {len(ACTIVATIONS) - 1} ({', '.join(ACTIVATIONS)})"
        )
    for i in range(layers):
        if norms[i * NORMS] is None or norms[i * NORMS + 3] is None:
            raise ValueError(f"{OP}: a norm of layer {i} is missing; only those of q and k may be None")
        dense = [size == 0 for size in formats[i * PARTS * FORMAT : (i + 1) * PARTS * FORMAT : FORMAT]]
        for group, (first, end) in enumerate(GROUPS):
            sparse = _selection(selections, i, group) is not None
            for part in range(first, end):
                weight, _, scales = linears[(i * PARTS + part) * TENSORS :][:3]
                if part > first and weight is None and sparse:  # the first part holds its outputs
                    continue
                if weight is None or weight.dim() != 2 or (scales is None and not dense[part]):
                    raise ValueError(f"{OP}: part {part} of layer {i} has no weight [N, K], or no scales")
                if dense[part] != dense[first]:
                    raise ValueError(f"{OP}: parts {first} and {part} of layer {i} must both be dense, or both 4-bit")


def _selection(
    selections: Sequence[Tensor | None], layer: int, group: int
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Level, scale and center of a group that is sparse."""
    at = (layer * len(GROUPS) + group) * SELECTION
    level, *rest = selections[at : at + SELECTION] or [None]
    return None if level is None else (level, *rest)  # type: ignore[return-value]


def _fake(x: Tensor, norms: list, eps: list, linears: list, formats: list, selections: list, *rest: object) -> Tensor:
    _, _, _, _, _, _, *known, _ = rest
    _check(x, norms, eps, linears, formats, selections, *known)  # type: ignore[arg-type]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def reference(
    x: Tensor,
    norms: Sequence[Tensor | None],
    eps: Sequence[float],
    linears: Sequence[Tensor | None],
    formats: Sequence[int],
    selections: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    start: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    windows: Sequence[int],
    heads: int,
    activation: int,
    scale: float,
) -> Tensor:
    _check(x, norms, eps, linears, formats, selections, k_caches, v_caches, windows, heads, activation)
    x = x.clone()
    for i, (k_cache, v_cache, window) in enumerate(zip(k_caches, v_caches, windows, strict=True)):
        G, D = k_cache.shape[1], k_cache.shape[3]

        def norm(of: Tensor, which: int, i: int = i) -> Tensor:
            weight = norms[i * NORMS + which]
            return of if weight is None else _by("rms_norm")(of, weight, eps[i * NORMS + which])

        def apply(group: int, of: Tensor, residual: Tensor | None = None, i: int = i) -> Tensor:
            first, end = (i * PARTS + part for part in GROUPS[group])
            tensors, numbers = linears[first * TENSORS : end * TENSORS], formats[first * FORMAT : end * FORMAT]
            return _apply(of, tensors, numbers, _selection(selections, i, group), residual)

        qkv = apply(0, norm(x, 0))
        if qkv.shape[-1] != (heads + 2 * G) * D:
            raise ValueError(f"{OP}: layer {i} gives {qkv.shape[-1]} numbers for {heads} and {G} heads of {D}")
        q, k, v = qkv.unflatten(-1, (-1, D)).split([heads, G, G], 2)
        q = _by("rotary_append")(norm(q, 1), norm(k, 2), v, cos, sin, positions, start, k_cache, v_cache)
        seen, _ = _by("tree_attention")(q, k_cache, v_cache, prefix, ancestors, window, scale)
        x = apply(1, seen.transpose(1, 2).flatten(2), x)
        gate, up = apply(2, norm(x, 3)).chunk(2, -1)
        hidden = _by("silu_mul")(gate, up) if activation == 0 else _by("gelu_mul")(gate, up, activation == 2)
        x = apply(3, hidden, x)
    return x


def _by(op: str) -> Callable[..., Any]:
    """The plain-torch code of an op."""
    return OPS[op].reference


def _apply(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    formats: Sequence[int],
    selection: tuple[Tensor, Tensor | None, Tensor | None] | None,
    residual: Tensor | None,
) -> Tensor:
    """Parts of one input, side by side."""
    parts = [tensors[at : at + TENSORS] for at in range(0, len(tensors), TENSORS)]
    dense, listed = formats[0] == 0, ()
    if selection is not None:
        x, *listed, _ = _by("channel_select")(x, *selection, None, RELATIVE, False)
    elif dense:
        weights = [part[0] for part in parts]
        return _by("linear")(x, weights, [part[1] for part in parts], residual)
    out = []
    for i, (weight, bias, *rest) in enumerate(parts):
        if weight is None:
            continue
        if dense:
            out.append(_by("sparse_linear")(x, weight, *listed, bias, None))
        else:
            op = _by("int4_sparse_linear" if listed else "int4_linear")
            out.append(op(x, weight, *rest, *listed, bias, *formats[i * FORMAT : (i + 1) * FORMAT]))
    y = torch.cat(out, -1)
    return y if residual is None else y + residual


_call: Callable[..., Tensor] = register(OP, SCHEMA, fake=_fake, reference=reference)


def decoder_layers(
    x: Tensor,
    norms: Sequence[Tensor | None],
    eps: Sequence[float],
    linears: Sequence[Tensor | None],
    formats: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    start: Tensor,
    prefix: Tensor,
    ancestors: Tensor | None,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    windows: Sequence[int],
    heads: int,
    activation: str,
    scale: float,
    selections: Sequence[Tensor | None] = (),
) -> Tensor:
    """Decoder layers, one after the other, on T new rows of each sequence; their keys and values enter the caches.

    Per layer: q, k, v = linear(norm(x)); q, k = norm(q), norm(k) where there are such; q = rotary_append(q, k, v);
    x += linear(tree_attention(q)); gate, up = linear(norm(x)); x += linear(activation(gate) * up).

    It computes what these ops of scrimp compute one by one, to the bit, and like them it is row-invariant; one call
    instead of nine a layer is what it is for.

    Args:
        x: `[B, T, d]` fp32 or bf16, B T at most 64.
        norms: 4 for each layer: before the attention `[d]`, of each head of q and of k `[D]` or None, before the MLP
            `[d]`.
        eps: of the norms, 4 for each layer.
        linears: 6 for each of the layer's 7 linear layers (q, k, v, o, gate, up, down): weight `[N, K]`, bias `[N]` or
            None, and None four times; where it is 4-bit qweight, bias and `Int4Weight`'s scales, zeros, codebook,
            permutation.
        formats: 3 for each linear layer: 0, 0, 0; where it is 4-bit `int4_linear`'s group_size, zero_kind and mode.
            Linear layers of one input must be of one kind.
        cos: fp32 `[P, R]` (`scrimp.ops.rotary_append`).
        sin: like `cos`.
        positions: int32 `[B, T]`.
        start: int32 `[B]`, slot of each sequence's first row.
        prefix: int32 `[B]`, slots that every row sees (`scrimp.ops.tree_attention`).
        ancestors: int64 `[1 or B, T]`, or None for the chain.
        k_caches: for each layer `[B, G, C, D]`, written in place.
        v_caches: like `k_caches`.
        windows: for each layer the last keys that a row sees, or 0 for all.
        heads: query heads H.
        activation: "silu", "gelu" or "gelu_tanh".
        scale: of the attention scores.
        selections: empty where every linear layer reads all of its input. Else 3 for each of a layer's 4 inputs (of
            q, k, v; of o; of gate, up; of down): level fp32 `[1]`, scale and center fp32 `[K]` or None, of
            `channel_select`'s rule "relative"; a level of -1 keeps all channels. Linear layers of such an input are
            those of `sparse_linear` (weights `[K, N]`) or `int4_sparse_linear` (the tensors of `Int4Channels`); the
            first may hold the outputs of all, with None for everything of the others. A level of None: not sparse.

    Returns:
        `[B, T, d]`, the state behind the last layer.

    Raises:
        ValueError: a shape, count or kind that does not fit, with the value; else what the ops raise.

    Source: the decoder layer of Llama (2302.13971).

    >>> import torch, scrimp
    >>> x, one, w = torch.ones(1, 1, 2), torch.ones(2), torch.eye(2)
    >>> cos, sin, zero = torch.ones(4, 2), torch.zeros(4, 2), torch.zeros(1, dtype=torch.int32)
    >>> cache, kind = torch.zeros(2, 1, 1, 4, 2), (0, 0, 0) * 7
    >>> layer = dict(norms=[one, None, None, one], eps=[0.0] * 4, linears=[w, *[None] * 5] * 7, formats=kind, heads=1)
    >>> rope = dict(cos=cos, sin=sin, positions=zero[None], start=zero, prefix=zero, ancestors=None, windows=[0])
    >>> caches = dict(k_caches=[cache[0]], v_caches=[cache[1]])
    >>> scrimp.ops.decoder_layers(x, **layer, **rope, **caches, activation="silu", scale=1.0).flatten().tolist()[:1]
    [2.7310585975646973]
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    which = ACTIVATIONS.index(activation)
    _check(x, norms, eps, linears, formats, selections, k_caches, v_caches, windows, heads, which)
    sees = (cos, sin, positions, start, prefix, ancestors, k_caches, v_caches, windows, heads, which, scale)
    return _call(x, norms, eps, linears, formats, selections, *sees)
