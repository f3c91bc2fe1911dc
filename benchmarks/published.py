"""What authors of other kernels publish of work like ours: printed beside predictions, reproduced by nobody here."""

from dataclasses import dataclass

from .results import Row


@dataclass(frozen=True)
class Published:
    """One figure of others.

    Args:
        peer: whose it is.
        shape: of what: sizes and device as far as the source names them, and whether it is a kernel or a whole model.
        figure: as published.
        source: where.
    """

    peer: str
    shape: str
    figure: str
    source: str


# By the op whose work comes nearest. FlashInfer's authors publish none for shapes of ours.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "int4_linear": (
        Published(
            "Marlin", "kernel: a large weight, groups of 128, up to 16 to 32 rows, A10", "3.87x fp16",
            "README of IST-DASLab/marlin",
        ),
    ),
    "sparse_attention": (
        Published(
            "MInference", "kernel: vertical-slash, 1M tokens, A100", "13x FlashAttention", "2407.02490, appendix D.2"
        ),
        Published(
            "MInference", "whole prefill: Llama-3-8B, 100K tokens, A100", "1.78x FlashAttention",
            "experiments/README of microsoft/MInference",
        ),
    ),
    "sparse_linear": (
        Published(
            "TEAL", "whole model: half of the inputs skipped, 1 row, A6000 or A100", "1.8x gpt-fast",
            "2408.14690, abstract; 1.43x in FasterDecoding/TEAL#11",
        ),
        Published("WINA", "kernel: 5120x17920, 1 row, A100", "up to 42 % faster", "2505.19427, 4.4"),
    ),
    "exact_head": (
        Published(
            "FlashHead", "whole model: Llama-3.2-3B, head 128256x3072, 1 row, bf16", "1.07x (54 to 58 tokens/s)",
            "model card of embedl's Llama-3.2-3B",
        ),
    ),
}  # fmt: skip


def published(op: str) -> list[Row]:
    """The rows of an op, labelled published."""
    return [
        {
            "op": op,
            "case": one.shape,
            "peer": one.peer,
            "label": "published",
            "figure": one.figure,
            "source": one.source,
        }
        for one in PUBLISHED.get(op, ())
    ]
