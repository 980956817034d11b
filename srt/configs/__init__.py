"""Configuration: what the user asks, what the checkpoint says, what was resolved from both."""
