"""One network as it streams, with and without gradient."""
