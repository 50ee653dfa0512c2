"""Which faults are worth another try."""

from typing import Any

from modal_eval.errors import ModalEvalError


async def is_retryable(_task: Any, _run: Any, state: Any) -> bool:
    """A fault that may pass by itself is retried; a wrong setting or a missing file is not."""
    try:
        await state.result()
    except ModalEvalError as error:
        return error.retryable
    except Exception:  # noqa: BLE001 - any other fault is unknown, and an unknown fault may pass
        return True
    return False
