"""Commands for people: a chat in the terminal, a file of requests."""
