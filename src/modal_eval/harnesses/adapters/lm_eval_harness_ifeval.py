"""IFEval as lm-eval scores it, without a download and without a dice.

lm-eval fetches NLTK's trained Punkt model when the task is loaded, and asks an unseeded langdetect. Here sentences are
split as our own IFEval splits them, with and without a network alike, and langdetect has a seed: scoring again gives the
same number. What lm-eval draws at random (a letter that a prompt leaves open) follows the run's seed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parents[1] / "environments" / "ifeval" / "text.py"
CHECKERS = "ifeval.instructions_util"
"""How the modules end that count words and sentences, in each of lm-eval's copies of IFEval."""


@contextmanager
def seeded_ifeval() -> Iterator[None]:
    """Keep IFEval's checkers from downloading while tasks are loaded, and make those that were loaded repeatable."""
    import nltk

    download = nltk.download

    def not_for_ifeval(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return True if caller.endswith(CHECKERS) else download(*args, **kwargs)

    nltk.download = not_for_ifeval
    try:
        yield
    finally:
        nltk.download = download
    for name, module in list(sys.modules.items()):
        if name.endswith(CHECKERS):
            make_repeatable(module)


def make_repeatable(checkers: Any) -> None:
    import langdetect

    text = load_text()
    langdetect.DetectorFactory.seed = text.LANGUAGE_SEED
    checkers.count_sentences = text.count_sentences
    checkers.nltk.word_tokenize = text.word_tokens


def load_text() -> Any:
    """The module of our IFEval that counts; by its path, because its package needs verifiers."""
    spec = importlib.util.spec_from_file_location("modal_eval_ifeval_text", TEXT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
