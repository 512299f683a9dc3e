"""Rows encoded once and kept: made, written, recognised, read in place of the encoders."""
