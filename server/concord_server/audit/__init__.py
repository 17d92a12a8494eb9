"""An append-only record of what happened, and of what was refused."""
