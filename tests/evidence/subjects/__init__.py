"""The ops whose GPU kernels are held up by evidence. A new op adds a file here and its line to `SUBJECTS`."""

from .int4_linear import SUBJECT as int4_linear
from .merge_attention import SUBJECT as merge_attention
from .sparse_attention import SUBJECT as sparse_attention
from .subject import Case, Mutant, Subject, pairwise
from .vertical_slash_index import SUBJECT as vertical_slash_index

SUBJECTS: dict[str, Subject] = {
    subject.op: subject for subject in (int4_linear, merge_attention, sparse_attention, vertical_slash_index)
}

__all__ = ["SUBJECTS", "Case", "Mutant", "Subject", "pairwise"]
