"""Plans, and the studies that they are submitted to."""
