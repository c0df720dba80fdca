"""Models that answer people: chat in the terminal, and data sets that a teacher writes."""
