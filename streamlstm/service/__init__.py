"""The daemon: the loop, the checked commit, metrics, HTTP."""
