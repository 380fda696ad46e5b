"""Gemsmith on a running Ray cluster."""
