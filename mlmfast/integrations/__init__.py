"""mlmfast behind tools that people use already: a module a tool, which needs the tool (an extra of its name)."""
