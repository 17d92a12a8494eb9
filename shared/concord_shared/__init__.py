"""The language that coordinator and node both speak: plans, updates, models, messages."""

__version__ = "0.1.0"
