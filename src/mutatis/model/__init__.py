"""What users hold: variables and modules, filters to choose among them, and operations on their states."""
