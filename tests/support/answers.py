"""What the scripted upstream says: text from the request alone, so that a repeated run hears the same answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]
Answer = Callable[[str, str, dict[str, str]], str]
"""(prompt, variant, right answers by question) → text. The variant tells the samples of one prompt apart."""


def hashed(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def sampled(prompt: str, variant: str, known: dict[str, str]) -> str:
    """Words that differ from sample to sample."""
    return f"sample {hashed(prompt, variant):016x} of: {prompt[-200:]}"


def forty_two(prompt: str, variant: str, known: dict[str, str]) -> str:
    return f"Let me think ({hashed(prompt, variant) % 10_000}). The answer is 42.\n#### 42"


def echo(prompt: str, variant: str, known: dict[str, str]) -> str:
    return prompt


def reverse(prompt: str, variant: str, known: dict[str, str]) -> str:
    return prompt[::-1]


def empty(prompt: str, variant: str, known: dict[str, str]) -> str:
    return ""


def gsm8k(prompt: str, variant: str, known: dict[str, str]) -> str:
    """Right for about half of the samples, by hash; a question that is not known gets a number by hash."""
    coin = hashed(prompt, variant)
    right = next((answer for question, answer in known.items() if question in prompt), None)
    if right is None:
        number = str(coin % 1000)
    elif coin % 2:
        number = right
    else:
        number = str(int(re.sub(r"[^\d-]", "", right) or 0) + 1 + coin % 7)
    return f"First we add, then we take away ({coin % 10_000}).\n#### {number}"


def known_answer(prompt: str, variant: str, known: dict[str, str]) -> str:
    """The answer that is known for the question at the prompt's end; nothing for a question that is not known."""
    if prompt in known:
        return known[prompt]
    asked = max(known, key=lambda question: (prompt.rfind(question), len(question)), default="")
    return known[asked] if asked and asked in prompt else ""


ANSWERS: dict[str, Answer] = {
    "known": known_answer,
    "sampled": sampled,
    "#### 42": forty_two,
    "echo": echo,
    "reverse": reverse,
    "empty": empty,
    "gsm8k": gsm8k,
}


def canonical_digest(body: Body) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def prompts_of(body: Body) -> list[str]:
    """The texts that are answered: the last user message, or each prompt of a `/v1/completions` call."""
    if "messages" in body:
        contents = [message.get("content") for message in body["messages"] if message.get("role") == "user"]
        return [_text(contents[-1] if contents else "")]
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return [_text(each) for each in prompt]
    return [_text(prompt)]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content or "")


def texts(body: Body, answer: str, variant: str, known: dict[str, str]) -> list[str]:
    """One text a choice: `n` for each prompt."""
    say = ANSWERS.get(answer, lambda *_: answer)
    return [
        say(prompt, f"{variant}#{index}" if index else variant, known)
        for prompt in prompts_of(body)
        for index in range(int(body.get("n") or 1))
    ]


def usage(body: Body, said: list[str]) -> dict[str, int]:
    prompt = len(json.dumps(body.get("messages", body.get("prompt", "")))) // 4 + 1
    completion = sum(len(words(text)) for text in said)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def response(body: Body, said: list[str], finish_reason: str, response_id: str) -> Body:
    """The whole answer as one JSON object."""
    chat = "messages" in body
    choices = []
    for index, text in enumerate(said):
        text = prompts_of(body)[0] + text if body.get("echo") else text
        choice: Body = {"index": index, "finish_reason": finish_reason, "logprobs": _logprobs(body, text)}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append(choice)
    return {**_envelope(body, response_id, chunked=False), "choices": choices, "usage": usage(body, said)}


def stream_events(body: Body, said: list[str], finish_reason: str, response_id: str) -> list[str]:
    """The `data:` payloads of a streamed answer: a word each, the reason, the usage when asked for, `[DONE]`."""
    chat = "messages" in body
    base = _envelope(body, response_id, chunked=True)
    events = []
    for index, text in enumerate(said):
        for position, word in enumerate(words(text)):
            role = {"role": "assistant"} if chat and position == 0 else {}
            part: Body = {"delta": {**role, "content": word}} if chat else {"text": word}
            choice = {"index": index, **part, "finish_reason": None, "logprobs": _logprobs(body, word)}
            events.append({**base, "choices": [choice]})
        end: Body = {"delta": {}} if chat else {"text": ""}
        events.append({**base, "choices": [{"index": index, **end, "finish_reason": finish_reason}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append({**base, "choices": [], "usage": usage(body, said)})
    return [*(json.dumps(event) for event in events), "[DONE]"]


def _envelope(body: Body, response_id: str, *, chunked: bool) -> Body:
    chat = "chat.completion.chunk" if chunked else "chat.completion"
    kind = chat if "messages" in body else "text_completion"
    return {"id": response_id, "object": kind, "created": 1_700_000_000, "model": body.get("model", "stub")}


def _logprobs(body: Body, text: str) -> Body | None:
    if not body.get("logprobs"):
        return None
    tokens = words(text)
    scores: list[float | None] = [log_probability(token) for token in tokens]
    if "messages" in body:
        content = [
            {"token": token, "logprob": score, "bytes": list(token.encode()), "top_logprobs": []}
            for token, score in zip(tokens, scores, strict=True)
        ]
        return {"content": content}
    offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
    top = None
    if body.get("echo"):  # nothing stands before the first token of a prompt
        scores[0] = None
        top = [None, *({token: score, "~": OTHER_TOKEN} for token, score in zip(tokens[1:], scores[1:], strict=True))]
    return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": top, "text_offset": offsets}


OTHER_TOKEN = -2.5
"""Log-probability of a token that could have stood in place of each."""


def log_probability(token: str) -> float:
    return -(hashed(token) % 5000) / 1000
