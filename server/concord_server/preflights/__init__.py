"""Preflights: whether a run of a plan could begin at each node, by each node's own signed word."""
