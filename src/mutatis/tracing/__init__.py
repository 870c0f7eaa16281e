"""How a function over models becomes a pure one for JAX, and how what it wrote gets back into the models."""
