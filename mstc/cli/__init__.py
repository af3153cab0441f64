"""The command line: one module or folder per command, loaded when it is called."""
