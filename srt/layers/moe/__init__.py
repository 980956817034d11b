"""Mixture of experts: a contract, a plain reference, and the block around them."""
