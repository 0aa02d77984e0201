"""mlmfast inside other people's tools, a file a tool; each needs its tool only when it is used."""
