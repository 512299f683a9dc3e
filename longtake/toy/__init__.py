"""The toy world: made, written, and measured with exact truth."""
