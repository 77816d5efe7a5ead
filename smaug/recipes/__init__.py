"""Published systems, one a file. A file's name is the name to type: `python -m smaug.train mac`."""
