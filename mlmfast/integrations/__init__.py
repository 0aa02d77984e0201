"""Tools that people already use, with mlmfast under them: a module each, which imports its tool when it is imported."""
