"""Reads off a chat template what stands before, between and after a prompt and its answer.

A template is a program in Jinja's language. It is run here once, in Jinja's sandbox for programs of
strangers, on a conversation of two marks, and only the text around the marks is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .sources import ConversionError, read_json

_PROMPT, _ANSWER = "PROMPT-oW3kz", "ANSWER-q8Vtn"


def chat_frame(folder: Path) -> dict[str, Any]:
    """Texts `before`, `between` and `after` of one prompt and one answer, and whether it `strips`.

    A template that writes the date writes the one that it has for readers without a clock.

    Raises:
      ConversionError: no template, one that cannot be run, or one that changes what is said.
    """
    template, settings = _read(folder)
    text = _render(template, settings, _PROMPT, _ANSWER)
    if text.count(_PROMPT) != 1 or text.count(_ANSWER) != 1:
        raise ConversionError(
            f"the chat template in {folder} does not write prompt and answer once each, as they are"
        )
    before, rest = text.split(_PROMPT)
    between, after = rest.split(_ANSWER) if _ANSWER in rest else ("", "")
    if before + _PROMPT + between + _ANSWER + after != text:
        raise ConversionError(f"the chat template in {folder} writes the answer before the prompt")
    spaced = _render(template, settings, f" {_PROMPT} ", _ANSWER)
    strips = spaced == text
    if not strips and spaced != f"{before} {_PROMPT} {between}{_ANSWER}{after}":
        raise ConversionError(f"the chat template in {folder} changes the white space of prompts")
    return {"before": before, "between": between, "after": after, "strips": strips}


def _read(folder: Path) -> tuple[str, dict[str, Any]]:
    """The template, and the tokens that it may name."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    own = folder / "chat_template.jinja"
    try:
        template = own.read_text("utf-8") if own.is_file() else settings.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{own} cannot be read: {error}; fetch it again") from None
    if isinstance(template, list):  # Several, by name.
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ConversionError(
            f"{folder} has no chat template, in which a reward model reads prompt and answer; "
            "fetch chat_template.jinja or tokenizer_config.json from where the weights are from"
        )
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            tokens[name] = token
    return template, tokens


def _render(template: str, settings: dict[str, Any], prompt: str, answer: str) -> str:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ConversionError("chat templates need Jinja; pip install 'aps_jax[text]'") from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=False, **settings)
    except Exception as error:  # A strange program can raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"the chat template cannot be run ({reason})") from None
