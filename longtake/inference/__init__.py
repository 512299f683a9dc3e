"""From weights of any origin to frames: streams, sessions, scripts, files."""
