"""The transforms: one page for each of JAX's, on top of `tracing` and `compilation`. None knows another."""
