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


# By the op whose work comes nearest. None is known to us for channel_select, int4_sparse_linear, codebook_topk,
# tree_accept, kv_compact and merge_attention.
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
    "tree_attention": (
        Published(
            "FlashInfer", "kernel: decoding of many rows behind one prefix, H100", "up to 31x vLLM's PagedAttention",
            "flashinfer.ai, Cascade Inference, 2024-02-02",
        ),
        Published(
            "Medusa", "whole model: Vicuna-7B, trees of 63 rows, A100", "1.71x plain decoding (authors: 2.18x)",
            "Spec-Bench; 2401.10774",
        ),
    ),
    "vq_logits": (
        Published("VQ-Logits", "logits of a head of codes, GPU not named", "up to 6x", "2505.10202, abstract"),
    ),
    "vq_sample": (
        Published(
            "FlashInfer", "whole engine: sampling in vLLM, three models, H100", "less than half of the sampling time",
            "flashinfer.ai, sampling, 2025-03-10",
        ),
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
