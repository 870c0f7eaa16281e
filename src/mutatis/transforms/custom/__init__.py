"""Functions with derivative rules of the user's."""
