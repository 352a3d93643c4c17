"What networks look at, and why not to believe it at once."
