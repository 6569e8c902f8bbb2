"""Snapshots, checkpoints, the progress chain, and coming back."""
