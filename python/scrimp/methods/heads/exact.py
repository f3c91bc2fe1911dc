"""ExactHead: a dense head with a screen beside it, for those who need its largest logits only."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._registry import OPS
from ...head_screen import HeadScreen
from ...ops.exact_head import MOST
from ..generation import decoder_model
from ..generation.linear import DenseLinear

MOST_ROWS = 16  # hidden states of a call; for more of them the dense head is about as fast
SPARE = 8  # logits asked for beyond those needed, in which equals of the last one end
TIE = 2.0**-20  # of a logit: two that are closer may become equal when they are divided by a temperature
HUGE = 1e30  # logits above it may overflow then

_exact_head = OPS["exact_head"].call
_log = logging.getLogger("scrimp")


class ExactHead(nn.Linear):
    """A head `[V, d]` without bias whose largest logits come from `scrimp.ops.exact_head`: the same bits, less work.

    `forward` computes all logits, as nn.Linear does. The screen belongs to the weight as it was: where that has been
    changed, moved or replaced since, all logits are computed until `compress_head` is called again. It is no buffer and
    never saved.

    Args:
        linear: the head whose weight it takes over, as the same parameter.
        screen: of that weight.

    Attributes:
        screen: the screen.
        counts: hidden states by how they were treated: "screened"; "fell back" (those of them whose certificate failed:
            all logits were computed by the op); "tied" (screened, but with equals that reach beyond those asked for,
            then computed densely); "dense" (all logits were wanted, or more rows than it pays for).
    """

    def __init__(self, linear: nn.Linear, screen: HeadScreen) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.train(linear.training)
        self.screen = screen
        self.counts: Counter[str] = Counter()
        self._seen = _state(linear.weight)
        self._said: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    @property
    def is_current(self) -> bool:
        """Whether the weight is still the one that the screen was made of."""
        return _state(self.weight) == self._seen

    def largest(self, x: Tensor, k: int) -> Tensor | None:
        """Logits `[.., V]` for hidden states `[.., d]`, -inf where they cannot be among the k largest.

        All equals of the k-th are there too, and all that dividing by a temperature could make equal; for k = 1 one of
        several largest, that of the lowest id. None where all logits must be computed, or had better be.
        """
        rows, V = x.numel() // max(self.in_features, 1), self.out_features
        asked = min(1 if k == 1 else k + SPARE, V)
        if k == 0:
            self._say("the choice of tokens needs all logits, so that the dense head runs (top_k or greedy avoid it)")
        elif asked > MOST:
            self._say(f"the choice of tokens needs more than {MOST} logits, so that the dense head runs")
        elif not self.is_current:
            self._say("the weight has changed since its screen was made: the dense head runs; call compress_head again")
        elif rows <= MOST_ROWS:
            return self._screened(x, k, asked)
        return None

    def _screened(self, x: Tensor, k: int, asked: int) -> Tensor:
        screen = self.screen
        values, ids, scored = _exact_head(x, self.weight, *screen.tensors().values(), screen.slack, screen.wide, asked)
        computed = scored.flatten().tolist()
        self.counts.update({"screened": len(computed), "fell back": computed.count(screen.rows)})
        out = x.new_full((*x.shape[:-1], screen.rows), -torch.inf).scatter_(-1, ids, values)
        if 1 < asked < screen.rows:
            best = values.float()
            last = best[..., k - 1]
            clear = (last - best[..., -1] > TIE * last.abs() + 1 / HUGE) & (best.abs() < HUGE).all(-1)
            if not bool(clear.all()):
                self.counts["tied"] += int((~clear).sum())
                out[~clear] = DenseLinear([self.weight], [None])(x[~clear])
        return out

    def _say(self, text: str) -> None:
        """Tells something once."""
        if text not in self._said:
            self._said.add(text)
            _log.warning("exact head: %s", text)

    @staticmethod
    def engine_linear(modules: Sequence[ExactHead]) -> EngineExactHead:
        """The head, for the decoding loop."""
        return EngineExactHead(modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactHead:
        copied = memo[id(self)] = ExactHead.__new__(ExactHead)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        if self.is_current:
            copied._seen = _state(copied.weight)
        return copied


class EngineExactHead(DenseLinear):
    """The head as the decoding loop calls it (`scrimp.methods.generation.linear.Head`)."""

    def __init__(self, heads: Sequence[ExactHead]) -> None:
        super().__init__([head.weight for head in heads], [None for _ in heads])
        (self._head,) = heads

    def largest(self, x: Tensor, k: int) -> Tensor:
        found = self._head.largest(x, k)
        if found is None:
            self._head.counts["dense"] += x.numel() // max(x.shape[-1], 1)
            return self(x)
        return found


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What changes where a weight is replaced, moved or written to."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device, weight.shape, weight.stride()


def exact_head(model: nn.Module, tokens: Tensor | None = None, wide: int | None = None) -> ExactHead:
    """The `ExactHead` of a model (see `compress_head`)."""
    decoder_model(model)
    linear = dense_head(model)
    states = None if tokens is None else hidden_states(model, tokens)
    return ExactHead(linear, HeadScreen.build(linear.weight.detach(), states, wide=wide))


def dense_head(model: nn.Module) -> nn.Linear:
    """The head of a model as a plain nn.Linear with the same parameter.

    Raises:
        ValueError: it is something else, or has a bias.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is ExactHead:
        plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        plain.weight = head.weight
        return plain.train(head.training)
    if type(head) is not nn.Linear:
        raise ValueError(f"compress_head: the model's head is a {type(head).__name__}; only nn.Linear can be replaced")
    if head.bias is not None:
        raise ValueError("compress_head: the model's head has a bias, which no method takes")
    return head


@torch.no_grad()
def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the head is given for tokens `[B, n]`, read text by text: `[B n, d]`.

    Raises:
        ValueError: tokens of another shape, or ids that the model does not have.
    """
    V = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        kind = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
        raise ValueError(f"compress_head: tokens must be ids [B, n], at least one, got {kind}")
    if not 0 <= (bad := int(tokens.min())) <= (bad := int(tokens.max())) < V:
        raise ValueError(f"compress_head: tokens has {bad}; ids are below {V}")
    base: Any = model.base_model
    parts = [base(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in tokens]
    return torch.cat(parts)
