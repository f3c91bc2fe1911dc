"""FrozenModel: a Hugging Face model taken apart, so that gradients pass through its upper layers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..generation.huggingface import decoder_model
from ..tree_decoding.maps import transfer


class _Seen:
    """Keys and values of a text, which rows that come later see; what those add is not kept."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """What a layer attends to, `[1, G, n, D]` (the interface of transformers' caches)."""
        if layer not in self._held:
            self._held[layer] = (keys, values)
            return keys, values
        return torch.cat([self._held[layer][0], keys], 2), torch.cat([self._held[layer][1], values], 2)


@dataclass(frozen=True)
class Reading:
    """A text as the model read it.

    Attributes:
        tokens: int64 `[n]`.
        states: before the first layer and after each, `[n, d]`.
        seen: its keys and values.
    """

    tokens: Tensor
    states: list[Tensor]
    seen: _Seen


class FrozenModel:
    """The model's own modules, with parameters that take no gradients any more.

    Raises:
        ValueError: the decoding loop does not know the model, some of its layers have windows, or its attention is not
            torch's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.view = decoder_model(model)
        if any(layer.window for layer in self.view.layers):
            raise ValueError(f"drafts cannot be trained for {self.view.name}: some of its layers have windows")
        attention = getattr(model.config, "_attn_implementation", None)
        if attention != "sdpa":  # others read a missing mask in other ways
            raise ValueError(f"drafts are trained with attn_implementation='sdpa', but the model has {attention!r}")
        model.requires_grad_(False).eval()
        parts: Any = model
        self._base, self._head = parts.model, parts.lm_head
        self._layers = list(self._base.layers[: len(self.view.layers)])
        self.depth, self.width = len(self._layers), self.view.embedding.shape[1]

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Reading:
        """Reads a text `[n]`."""
        x, seen = self._base.embed_tokens(tokens[None]), _Seen()
        angles = self._base.rotary_emb(x, torch.arange(len(tokens), device=tokens.device)[None])
        states = [x[0]]
        for layer in self._layers:
            x = layer(x, position_embeddings=angles, past_key_values=seen)
            states.append(x[0])
        return Reading(tokens, states, seen)

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits of states after the last layer, `[.., d]` -> `[.., V]`."""
        out: Tensor = self._head(self._base.norm(states))
        return out.float()

    def ahead(self, text: Reading, layer: int, rows: Tensor, maps: tuple[Tensor, Tensor], upper: bool = True) -> Tensor:
        """Last states of pseudo rows behind some rows of a text, each behind its own row alone.

        Args:
            layer: layers after which states are mapped.
            rows: int64 `[A]`.
            maps: weight `[k, d, d]` and bias `[k, d]`.
            upper: whether the pseudo rows go through the layers that are left.

        Returns:
            `[A, k, d]`; gradients flow to the maps.
        """
        ahead = transfer(text.states[layer][rows], *maps)
        if not upper:
            return ahead
        (A, k, _), n = ahead.shape, len(text.tokens)
        number = torch.arange(A * k, device=rows.device)
        among = (number[:, None] // k == number // k) & (number[:, None] >= number)
        before = rows.repeat_interleave(k)[:, None] >= torch.arange(n, device=rows.device)
        mask = torch.cat([before, among], 1)[None, None]
        at = (rows[:, None] + torch.arange(1, k + 1, device=rows.device)).flatten()[None]
        x = ahead.flatten(0, 1)[None]
        angles = self._base.rotary_emb(x, at)
        for each in self._layers[layer:]:
            x = each(x, attention_mask=mask, position_embeddings=angles, past_key_values=text.seen)
        return x[0].unflatten(0, (A, k))
