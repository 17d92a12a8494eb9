"""The coordinator: the round machine, the exact sum, checkpoints. Nothing in here ever sees a row of data."""
