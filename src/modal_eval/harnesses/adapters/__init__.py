"""The half of a harness that runs in the harness's own environment: standard library and the harness, nothing else."""
