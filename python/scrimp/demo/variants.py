"""The sparse variants of the demo: one per budget of the model's per-head attention patterns, the main one first."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .measure import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sparse_variants(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[Variant]:
    """Sparse variants of `model`, from its head patterns."""
    from ..methods.head_patterns import shipped_patterns

    budgets = shipped_patterns(model)
    if budgets is None:
        raise ValueError("no head patterns come with scrimp for this model's weights; run `scrimp calibrate` for it")
    return from_patterns(budgets)


def from_patterns(patterns: Mapping[str, Any]) -> list[Variant]:
    """A variant per entry of budget name -> HeadPatterns."""
    from ..integrations import transformers as integration

    integration.register()

    def variant(name: str, chosen: Any) -> Variant:
        def switch(model: "PreTrainedModel") -> None:
            integration.configure(model, chosen)
            model.set_attn_implementation("scrimp_sparse")

        return Variant(name, switch, integration.watch_plans)

    return [variant(name, chosen) for name, chosen in patterns.items()]
