"""What is missing on this machine, and whether a stage fits, before anything is loaded."""
