"""Weight formats: how the bytes of a checkpoint become a matrix product."""
