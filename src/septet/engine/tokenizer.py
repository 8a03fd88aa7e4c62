"""Text to tokens and back, and chat templates, with the `tokenizers` library and jinja2 instead of transformers.

A template is a program of whoever made the model, so it runs in jinja2's sandbox. Reading a checkpoint executes nothing else.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from septet.checkpoint.directory import read_json
from septet.errors import CheckpointError, OptionError, UnsupportedModelError

__all__ = ["Pieces", "Tokenizer", "check_text"]

_TOKENIZER, _CONFIG, _TEMPLATE, _GENERATION = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
#: What a template can run into, beside jinja2's own errors.
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of a model directory.

    Args:
        directory: a directory with tokenizer.json.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedModelError: there is no tokenizer.json, or the library `tokenizers` is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        tokenizers = _import("tokenizers")
        if not (path / _TOKENIZER).is_file():
            hint = "run this model through transformers"
            raise UnsupportedModelError(f"for the native engine, a model must have {_TOKENIZER}", "none", hint)
        self._path = path / _TOKENIZER
        with _Refusals(self._path):
            self._tokenizer = tokenizers.Tokenizer.from_str(self._path.read_text("utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = read_json(path / _CONFIG) if (path / _CONFIG).is_file() else {}
        self._names = {name: text for name in _NAMED if (text := _content(self._config.get(name))) is not None}
        self.chat_template = _find_template(path, self._config)
        self.stop_tokens = self._find_stops(path)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around every text.

        Raises:
            OptionError: the text is not Unicode.
            CheckpointError: the tokenizer cannot express it.
        """
        check_text(text)
        with _Refusals(self._path):
            ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        begin = self._tokenizer.token_to_id(self._names.get("bos_token", ""))
        if special and self._config.get("add_bos_token") is True and begin is not None and ids[:1] != [begin]:
            return [begin, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Turn a conversation into tokens with the model's chat template.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} in order.

        Returns:
            Token ids that end where the assistant's answer begins.

        Raises:
            CheckpointError: there is no template, or it fails.
        """
        if not self.chat_template:
            raise CheckpointError("chat needs a chat template", "a tokenizer without one", "use `septet run`, which takes a raw prompt")
        return self.encode(_render(self.chat_template, list(messages), self._names), special=False)

    def _find_stops(self, path: Path) -> frozenset[int]:
        """Tokens that end a text: those of the generation config, else of the config, and the tokenizer's own."""
        ends: object = None
        for name in (_GENERATION, "config.json"):
            if ends is None and (path / name).is_file():
                ends = read_json(path / name).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        own = self._tokenizer.token_to_id(self._names.get("eos_token", ""))
        return frozenset(token for token in [*ends, own] if type(token) is int)


class Pieces:
    """Tokens to text as they come, holding back characters whose bytes are not all there yet.

    Args:
        decode: token ids -> text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._decode = decode
        # Decoding restarts a little before the new token, so that spaces between tokens come out right.
        self._begin = self._shown = 0

    def add(self, token: int) -> str:
        """The text that a token completes; empty while a character is incomplete."""
        self.ids.append(token)
        whole = self._decode(self.ids[self._begin :])
        return "" if whole.endswith("\ufffd") else self._show(whole)

    def finish(self) -> str:
        """What was held back."""
        return self._show(self._decode(self.ids[self._begin :]))

    def _show(self, whole: str) -> str:
        piece = whole[len(self._decode(self.ids[self._begin : self._shown])) :]
        self._begin, self._shown = self._shown, len(self.ids)
        self.text += piece
        return piece


def check_text(text: str) -> None:
    """Raise unless a text can be written as UTF-8: what comes from a terminal may hold bytes that are no characters.

    Raises:
        OptionError: it cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"a byte that is no character, at place {error.start}"
        raise OptionError("a text must be UTF-8", got, "check the encoding of the terminal or file") from error


class _Refusals:
    """A context that turns what `tokenizers` raises, a bare Exception or a panic, into an error about the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if type(error) is Exception or type(error).__name__ == "PanicException" or isinstance(error, OSError | UnicodeDecodeError):
            raise CheckpointError(f"{self._path.name} must be a tokenizer", error, f"{self._path} is damaged; fetch it again") from error


def _import(name: str) -> Any:
    """An optional library, or an error that sends the caller to transformers."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = "pip install septet[engine]"
        raise UnsupportedModelError(f"the native engine needs the library {name}", "an import error", hint) from error


def _content(token: object) -> str | None:
    """The text of a special token: a string, or an object that describes it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _find_template(path: Path, config: Mapping[str, object]) -> str | None:
    if (path / _TEMPLATE).is_file():
        try:
            return (path / _TEMPLATE).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{_TEMPLATE} must be UTF-8", error, f"{path / _TEMPLATE} is damaged; fetch it again") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def _render(template: str, messages: list[Mapping[str, str]], names: Mapping[str, str]) -> str:
    """A chat template's text, rendered as transformers does it."""
    jinja2, sandbox = _import("jinja2"), _import("jinja2.sandbox")

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **names)
    except (jinja2.exceptions.TemplateError, *_FAILURES) as error:
        raise CheckpointError("the chat template must accept the conversation", error, "check the roles and their order") from error
