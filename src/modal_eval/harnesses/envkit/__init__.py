"""What the shipped environments share. Runs in the harness's environment, so it imports nothing of modal_eval's own
dependencies: the standard library, and `datasets` or `verifiers` where they are used."""
