"""What users build: variables of several kinds in modules, and all that can be asked of a model or done to it."""
