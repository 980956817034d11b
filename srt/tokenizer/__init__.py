"""The tokenizer process: prompts to token ids on the way down, token ids to text on the way up."""
