"""Paged attention: a contract, a plain reference, and the layer around them."""
