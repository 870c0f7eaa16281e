"""Cells, and the transactions that are laid over them. Nothing here knows of models, or of any transform."""
