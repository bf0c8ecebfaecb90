"""One file for each word of the command line, named like it, with a `main(arguments)` that returns the exit code."""
