"""The transforms of JAX for functions that read and write state: one page each."""
