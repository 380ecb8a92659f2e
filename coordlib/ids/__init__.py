"""Ids without a cluster below: layouts, minting, texts, and what can be read from an id."""
