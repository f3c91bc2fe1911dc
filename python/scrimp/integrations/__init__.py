"""Adapters for other libraries; imported by the user, never by scrimp itself."""
