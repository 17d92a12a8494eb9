"""Models that concord does not ship, as a partner would bring their own."""
