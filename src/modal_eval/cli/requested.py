"""`python -m modal_eval.cli.requested FILE`: what `modal-eval run` does, with its request in a file. A suite starts its
benchmarks so, because no command line says every setting as exactly as a file does."""

from __future__ import annotations

import sys
from pathlib import Path

from modal_eval.cli.evaluating import evaluate
from modal_eval.cli.output import complain
from modal_eval.config.request import RunRequest
from modal_eval.errors import EXIT_INTERRUPTED, ModalEvalError


def main(path: str) -> int:
    try:
        return evaluate(RunRequest.model_validate_json(Path(path).read_text(encoding="utf-8")), as_json=False)
    except ModalEvalError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
