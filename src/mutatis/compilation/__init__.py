"""How `mu.jit` compiles a function over models once, and calls it again at the cost of threading its states by hand."""
