"""Weights on disk, in every published layout: found, read, named, written."""
