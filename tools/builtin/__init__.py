"""Makes the built-in model: tokenizer, training, export, evaluation."""
