"""How EvalPlus 0.3.1 asks: through a chat API, with the answer begun for the model, or as text to be continued."""

from __future__ import annotations

from typing import Any, Literal

from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

from modal_eval.harnesses.adapters.evalplus_oracle import Task

PromptFormat = Literal["chat", "prefill", "base"]
FORMATS: tuple[PromptFormat, ...] = ("chat", "prefill", "base")
"""`chat` as `evalplus.codegen --backend openai` asks · `prefill` as its vLLM and HF backends ask a model with a chat template
(the server has to know `continue_final_message`, as vLLM does) · `base` as they ask a base model: the prompt, continued."""

SYSTEM = "You are a helpful assistant good at coding."
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)


def request_for(task: Task, prompt_format: PromptFormat) -> dict[str, Any]:
    """The request without model and sampling. `codegen` strips each prompt and ends it with one newline."""
    prompt = task.prompt.strip()
    if prompt_format == "chat":
        user = f"{INSTRUCTION}\n```python\n{prompt}\n```"
        return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]}
    if prompt_format == "base":
        return {"prompt": prompt + "\n", "stop": [*EOS, *extra_eos_for_direct_completion(task.dataset)]}
    return {
        "messages": [
            {"role": "user", "content": f"{INSTRUCTION}\n```\n{prompt}\n```\n"},
            {"role": "assistant", "content": f"{RESPONSE}\n```python\n"},
        ],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "stop": [*EOS, "\n```\n"],
    }


def read_completion(reply: dict[str, Any]) -> tuple[str, str | None]:
    """Text and finish reason of the one choice."""
    choice = reply["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"].get("content")
    return text or "", choice.get("finish_reason")
