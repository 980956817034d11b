"""`server eval`: asks a running server the tasks of the built-in model, over HTTP, and counts right answers."""
