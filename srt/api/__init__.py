"""The api process: HTTP in, requests to the tokenizer, answers back as JSON and server-sent events."""
