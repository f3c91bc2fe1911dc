"""Tree decoding: draft sources, the trees they make, and the steps that check them."""

from .api import TreeDecoding, tree_decoding
from .cost import CostCurve
from .draft import Accepted, Candidates, Draft, DraftSource
from .sources import EarlyExit, LookupDraft, ModelDraft, NgramDraft, RecyclingDraft, SelfDraft
from .tree import Tree

__all__ = [
    "Accepted",
    "Candidates",
    "CostCurve",
    "Draft",
    "DraftSource",
    "EarlyExit",
    "LookupDraft",
    "ModelDraft",
    "NgramDraft",
    "RecyclingDraft",
    "SelfDraft",
    "Tree",
    "TreeDecoding",
    "tree_decoding",
]
