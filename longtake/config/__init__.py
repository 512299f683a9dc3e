"""Every configuration value: its name, type, default, meaning and rules."""
