"""The shipped environments: one package each, named as its `env_id`.

The adapter puts this folder on the path after everything installed, so a package of the same id from the Prime hub wins.
"""
