"""In-context learning with masked language models: tasks, evaluation, needle in a haystack (Samuel 2024)."""
