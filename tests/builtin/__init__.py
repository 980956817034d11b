"""Tests of the built-in model and its tasks."""
