"""Bytes in, columns out: what was read, what it means, and what could not be understood."""
