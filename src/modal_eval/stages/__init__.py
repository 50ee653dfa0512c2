"""The stages of a run, one module each, free of Prefect: `tasks/` gives them names and retries, the CLI calls some.

This is the one place where serving, proxy, harnesses, scoring and results meet.
"""
