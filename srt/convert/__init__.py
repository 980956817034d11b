"""`server convert`: a checkpoint in one weight format to the same in another, on disk."""
