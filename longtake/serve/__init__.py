"""A server in which videos play while they are made and are steered while they play."""
