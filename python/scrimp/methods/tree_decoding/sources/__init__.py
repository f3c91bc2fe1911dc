"""Draft sources: each guesses how a text goes on, all of them may be used together."""

from .heads import HiddenTransfer, MedusaHeads, trained
from .lookup import LookupDraft
from .model import EarlyExit, ModelDraft, SelfDraft
from .ngram import NgramDraft
from .recycling import RecyclingDraft

__all__ = [
    "EarlyExit",
    "HiddenTransfer",
    "LookupDraft",
    "MedusaHeads",
    "ModelDraft",
    "NgramDraft",
    "RecyclingDraft",
    "SelfDraft",
    "trained",
]
