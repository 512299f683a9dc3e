"""What stages train by: an objective a file, with its own group of keys. Read without torch, built and run with it."""
