"""Datasets: the cards that nodes publish of what they hold."""
