"""One call of a transform: what it can reach, and the user's function run over JAX's values."""
