"""Steps from one schema to the next, for both databases."""
