"""Fixtures of the coordinator: see coordinators.py."""

from coordinators import coordinator, database_url, postgresql

__all__ = ["coordinator", "database_url", "postgresql"]
