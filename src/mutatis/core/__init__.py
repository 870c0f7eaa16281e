"""The engine: cells that hold one value each, and transactions that catch reads and writes, and keep or drop them."""
