"""The command line: `ranger-nn plan|run|bench MODEL INPUT...`.

Enter at `main.main`. Each command has a file of its own, and imports its framework only when it
runs, so that `ranger-nn --help` is quick. Results go to standard output, progress and errors to
standard error; the exit status is 0 for success, 1 for a failure, 2 for wrong usage, 130 after
Ctrl-C, 141 if the reader of standard output left, 143 after SIGTERM. A .pt2 archive may come from
anyone (`archive/`); `package.module:factory` is the user's own Python, and is run.
"""
