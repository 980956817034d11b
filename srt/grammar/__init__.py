"""Constraints on the form of answers: compiled in processes of their own, obeyed by the worker token by token."""
