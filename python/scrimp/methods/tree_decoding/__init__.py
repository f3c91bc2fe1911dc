"""Tree decoding: draft sources, the trees they make, and the steps that check them."""

from .api import TreeDecoding, tree_decoding
from .cost import CostCurve
from .draft import Accepted, Candidates, Draft, DraftSource
from .maps import DraftMaps
from .sources import (
    EarlyExit,
    HiddenTransfer,
    LookupDraft,
    MedusaHeads,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
    SelfDraft,
    trained,
)
from .tree import Tree

__all__ = [
    "Accepted",
    "Candidates",
    "CostCurve",
    "Draft",
    "DraftMaps",
    "DraftSource",
    "EarlyExit",
    "HiddenTransfer",
    "LookupDraft",
    "MedusaHeads",
    "ModelDraft",
    "NgramDraft",
    "RecyclingDraft",
    "SelfDraft",
    "Tree",
    "TreeDecoding",
    "trained",
    "tree_decoding",
]
