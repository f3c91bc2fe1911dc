"""Adapters: one file per peer library; `registry` says what a file holds."""
