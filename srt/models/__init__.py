"""Model families: their blocks, and the maps from their checkpoints."""
