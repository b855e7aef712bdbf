"""The command line: one thin module per command, each of them one library call."""
