"""The ops: one file each, with schema, checks, fake, reference and the documented public function."""

from .channel_select import channel_select
from .codebook_topk import codebook_topk
from .decoder_layers import decoder_layers
from .exact_head import exact_head
from .gelu_mul import gelu_mul
from .int4_linear import int4_linear
from .int4_sparse_linear import int4_sparse_linear
from .kv_compact import kv_compact
from .linear import linear
from .merge_attention import merge_attention
from .rms_norm import rms_norm
from .rotary_append import rotary_append
from .silu_mul import silu_mul
from .sparse_attention import sparse_attention
from .sparse_linear import sparse_linear
from .tree_accept import tree_accept
from .tree_attention import tree_attention
from .vertical_slash_index import vertical_slash_index
from .vq_logits import vq_logits
from .vq_sample import vq_sample

__all__ = [
    "channel_select",
    "codebook_topk",
    "decoder_layers",
    "exact_head",
    "gelu_mul",
    "int4_linear",
    "int4_sparse_linear",
    "kv_compact",
    "linear",
    "merge_attention",
    "rms_norm",
    "rotary_append",
    "silu_mul",
    "sparse_attention",
    "sparse_linear",
    "tree_accept",
    "tree_attention",
    "vertical_slash_index",
    "vq_logits",
    "vq_sample",
]
