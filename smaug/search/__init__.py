"""Search over one's own videos with a trained run: an index on disk, queries in words, and a local page."""
