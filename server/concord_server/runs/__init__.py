"""Runs are rows: what was started, who approved it, how far it is."""
