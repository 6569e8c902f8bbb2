"""How weights change: cells, the model, one update."""
