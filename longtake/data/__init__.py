"""Data sets on disk in every known format: recognised, read, put in order, handed out in batches."""
