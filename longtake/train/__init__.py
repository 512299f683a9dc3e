"""A stage: built from its configuration, and the one loop that trains it."""
