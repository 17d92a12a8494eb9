"""The HTTP face of the coordinator: who may ask, how errors look, what all routes have in common."""
