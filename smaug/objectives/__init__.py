"""Training signals, one a file.

An objective is a frozen dataclass of its settings. `heads(model)` builds the modules that it needs,
`__call__(heads, seen)` turns what the encoders saw into a scalar, and `count(seen)` says how much that is a mean
over, so that processes with unequal shares can agree; None: over as much in each process. It owns no parameters and
knows no recipe.
"""
