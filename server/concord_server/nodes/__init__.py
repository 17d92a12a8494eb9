"""Invitations, nodes, the roster, and the channel over which nodes are told."""
