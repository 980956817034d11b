"""The CPU backends in C++: the same contracts as the torch ones, one native call each."""
