"""Adapters: one file per peer library."""
