"""The ops whose GPU kernels are held up by evidence. A new op adds a file here and its line to `SUBJECTS`."""

from .channel_select import SUBJECT as channel_select
from .codebook_topk import SUBJECT as codebook_topk
from .exact_head import SUBJECT as exact_head
from .gelu_mul import SUBJECT as gelu_mul
from .int4_linear import SUBJECT as int4_linear
from .int4_sparse_linear import SUBJECT as int4_sparse_linear
from .kv_compact import SUBJECT as kv_compact
from .linear import SUBJECT as linear
from .merge_attention import SUBJECT as merge_attention
from .rms_norm import SUBJECT as rms_norm
from .rotary_append import SUBJECT as rotary_append
from .silu_mul import SUBJECT as silu_mul
from .sparse_attention import SUBJECT as sparse_attention
from .sparse_linear import SUBJECT as sparse_linear
from .subject import Case, Mutant, Subject, pairwise
from .tree_accept import SUBJECT as tree_accept
from .tree_attention import SUBJECT as tree_attention
from .vertical_slash_index import SUBJECT as vertical_slash_index
from .vq_logits import SUBJECT as vq_logits
from .vq_sample import SUBJECT as vq_sample

SUBJECTS: dict[str, Subject] = {
    subject.op: subject
    for subject in (
        channel_select, codebook_topk, exact_head, gelu_mul, int4_linear, int4_sparse_linear, kv_compact, linear,
        merge_attention, rms_norm, rotary_append, silu_mul, sparse_attention, sparse_linear, tree_accept,
        tree_attention, vertical_slash_index, vq_logits, vq_sample,
    )
}  # fmt: skip

__all__ = ["SUBJECTS", "Case", "Mutant", "Subject", "pairwise"]
