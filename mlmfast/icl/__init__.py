"""In-context learning with masked language models: the experiments of Samuel (2024)."""
