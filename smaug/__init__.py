"""smaug: efficient video-language pre-training, and a kernel library for sparse vision tokens.

A token that will not be used is never read from the picture, never embedded, never attended to, never padded, and
never copied. Train with `python -m smaug.train --fast`; the ops alone are `from smaug import ops`. Importing `smaug`
imports nothing else.
"""

__version__ = "0.1.0"
