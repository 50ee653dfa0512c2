"""What `modal-eval run` and `modal-eval suite` do, with the request in a file: no command line says every setting as exactly.

`python -m modal_eval.cli.requested run FILE`, by which a suite starts its benchmarks, and `suite FILE AT_ONCE`, by which a
batch starts its suites.
"""

from __future__ import annotations

import sys
from pathlib import Path

from modal_eval.cli.evaluating import evaluate
from modal_eval.cli.output import complain
from modal_eval.cli.suite import exit_code, run_suite, show_table
from modal_eval.config.request import RunRequest, SuiteRequest
from modal_eval.errors import EXIT_INTERRUPTED, ModalEvalError
from modal_eval.stages.children import end_with_parent


def main(kind: str, path: str, at_once: str = "1") -> int:
    end_with_parent()
    text = Path(path).read_text(encoding="utf-8")
    try:
        if kind == "run":
            return evaluate(RunRequest.model_validate_json(text), as_json=False)
        suite = run_suite(SuiteRequest.model_validate_json(text), int(at_once))
    except ModalEvalError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED
    show_table(suite)
    return exit_code(suite.outcomes())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
