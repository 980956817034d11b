"""What a model is made of: layers over tensors, and the fast backends that stand in for them."""
