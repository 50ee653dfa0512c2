"""`python -m modal_eval.cli` is `modal-eval`."""

from modal_eval.cli.app import main

main()
