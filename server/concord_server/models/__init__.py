"""Trained models: their lineage, their files, their release."""
