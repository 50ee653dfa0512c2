"""The code in an answer: as EvalPlus's `sanitize` finds it, and with the helpers that it wrongly leaves out.

`sanitize` drops every function without a `return`, whether the solution calls it or not: a generator (MBPP/630's own
reference has one), a helper that changes a list in place. Its reason is a good one, stubs that an answer repeats from the
prompt; so such a function is kept only where the answer has no other of its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from modal_eval.harnesses.adapters.evalplus_oracle import without_datasets


@dataclass(frozen=True)
class Extracted:
    """What is judged of an answer."""

    solution: str
    evalplus_solution: str
    """What EvalPlus judges; mostly the same."""
    how: str = "sanitize"


def extract(text: str, entry_point: str) -> Extracted:
    """Both ways to read the code in `text`. Takes time with the square of the text's lines."""
    without_datasets()
    from evalplus import sanitize as evalplus

    found: str = evalplus.code_extract(text)
    originals = evalplus.code_extract, evalplus.has_return_statement
    evalplus.code_extract = lambda code: found if code == text else originals[0](code)
    try:
        theirs = evalplus.sanitize(text, entry_point)
        returning = _returning_functions(found)
        evalplus.has_return_statement = lambda node: (
            originals[1](node) or evalplus.get_definition_name(node) not in returning
        )
        ours = evalplus.sanitize(text, entry_point)
    finally:
        evalplus.code_extract, evalplus.has_return_statement = originals
    return Extracted(ours, theirs, "sanitize" if ours == theirs else "sanitize, with functions that return nothing")


def _returning_functions(code: str) -> set[str]:
    """Names of the functions at the top of the code that have a `return`."""
    import tree_sitter_python
    from evalplus import sanitize as evalplus
    from tree_sitter import Language, Parser

    tree = Parser(Language(tree_sitter_python.language())).parse(code.encode())
    functions = [node for node in tree.root_node.children if node.type == evalplus.FUNCTION_TYPE]
    return {evalplus.get_definition_name(node) for node in functions if evalplus.has_return_statement(node)}
