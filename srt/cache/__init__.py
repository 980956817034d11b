"""KV memory: which page holds which tokens, who reads it, and which prefix is already there. No torch."""
