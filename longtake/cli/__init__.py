"""The command line: one file a group of commands; they import what they start when it is started."""
