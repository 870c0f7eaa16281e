"""Functions with derivative rules of the user's: `mu.custom_vjp` and `mu.custom_jvp`."""
