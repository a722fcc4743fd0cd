"""Figures that anyone can reproduce: `python -m benchmarks`, or one row by `python -m benchmarks.NAME`.

Each file is one piece of work: the untouched network and the regional one in the same process, the
peak by `ranger_nn.measure` and the time by interleaved runs, apart from each other. `common` says
what is counted.
"""
