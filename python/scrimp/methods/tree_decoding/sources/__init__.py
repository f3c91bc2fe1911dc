"""Draft sources: each guesses how a text goes on, all of them may be used together."""

from .lookup import LookupDraft
from .model import EarlyExit, ModelDraft, SelfDraft
from .ngram import NgramDraft
from .recycling import RecyclingDraft

__all__ = ["EarlyExit", "LookupDraft", "ModelDraft", "NgramDraft", "RecyclingDraft", "SelfDraft"]
