"""srt: a serving runtime for multimodal mixture-of-experts language models."""

__version__ = "0.1.0"
