"""The whole life of a model in order: stages, the gates that they must pass, what is tried again, and the report."""
