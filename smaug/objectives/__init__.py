"""Training signals, one a file.

An objective is a frozen dataclass of its settings. `heads(model)` builds the modules that it needs,
`__call__(heads, seen)` turns what the encoders saw into a scalar. It owns no parameters and knows no recipe.
"""
