"""Chat templates: what a tokenizer puts before and after a prompt, so that the runtime needs no template language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_PROMPTS = ("a\ufffcz", " \n\ufffc\n ")  # the second one: a template that strips a prompt is no frame around it


def frame(render: Callable[[str], str], what: str) -> tuple[str, str]:
    """The texts before and after a prompt in `render(prompt)`; ValueError where it changes the prompt itself."""
    before, found, after = render(_PROMPTS[0]).partition(_PROMPTS[0])
    if not found or any(render(prompt) != f"{before}{prompt}{after}" for prompt in (*_PROMPTS, "")):
        raise ValueError(f"{what} changes prompts beyond putting text before and after them")
    return before, after


def chat(messages: Callable[[str], Sequence[dict[str, Any]]], **options: Any) -> Callable[[Any], tuple[str, str]]:
    """The frame that a tokenizer's own chat template makes of `messages(prompt)`; options go to the template."""

    def found(tokenizer: Any) -> tuple[str, str]:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("it has no chat template (chat_template.jinja), which the pipeline uses")

        def render(prompt: str) -> str:
            text: str = tokenizer.apply_chat_template(messages(prompt), tokenize=False, **options)
            return text

        return frame(render, "its chat template")

    return found


def user(prompt: str) -> list[dict[str, Any]]:
    """One message, the prompt."""
    return [{"role": "user", "content": prompt}]
