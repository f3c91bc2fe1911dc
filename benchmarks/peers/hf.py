"""Hugging Face's own greedy loop."""

from typing import Any

from torch import Tensor

from ..registry import Peer

DISTRIBUTION = "transformers"


def available() -> str | None:
    """transformers must be there."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed; pip install 'transformers>=5'"
    return None


def e2e(model: Any, ids: Tensor, new: int, **options: Any) -> Peer:
    """`model.generate`, which stops at no token."""
    from ..e2e import agreement

    def call() -> Tensor:
        found: Tensor = model.generate(
            ids, max_new_tokens=new, do_sample=False, eos_token_id=model.config.vocab_size, pad_token_id=0, **options
        )
        return found[:, ids.shape[1] :]

    return Peer(call, same=False, fields=agreement)
