"""The configuration: its model, how it is loaded, and the reference generated from it."""
