"""Wan's transformer, its attention, and the key/value cache that it streams with."""
