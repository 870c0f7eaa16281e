"""Programs that are kept: how a call finds the one that was compiled for it, and runs it."""
