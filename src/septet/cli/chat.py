"""`septet chat`: a conversation through the model's chat template; answers on stdout, the prompt sign on stderr."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from septet.cli import options
from septet.cli.app import app
from septet.cli.model import load
from septet.cli.output import note
from septet.errors import OptionError

__all__ = ["chat"]


@app.command()
def chat(
    directory: options.ModelArgument,
    message: Annotated[str | None, typer.Argument(help="One message to answer; without it, one per line is read from stdin.")] = None,
    system: Annotated[str | None, typer.Option(help="System message; default: that of the template.")] = None,
    max_new_tokens: options.TokensOption = 512,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = 0,
    min_p: options.MinPOption = 0.0,
    repetition_penalty: options.PenaltyOption = 1.0,
    activations: options.ActivationOption = None,
    engine: options.EngineOption = options.EngineChoice.auto,
    device: options.DeviceOption = "cpu",
) -> None:
    """Talk to a model: each line is a message, an empty line or end of file ends the conversation."""
    from septet import generate

    sampling = generate.Sampling(max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    model, tokenizer = load(directory, activations, engine, device)
    conversation = [{"role": "system", "content": system}] if system else []
    for line in [message] if message is not None else _lines():
        conversation.append({"role": "user", "content": line})
        prompt = generate.chat_prompt(tokenizer, conversation)
        answer = generate.complete(model, tokenizer, prompt, sampling, on_text=lambda piece: typer.echo(piece, nl=False))
        typer.echo()
        conversation.append({"role": "assistant", "content": answer.text})


def _lines():
    """Messages from stdin; a terminal gets a prompt sign."""
    terminal = sys.stdin.isatty()
    if terminal:
        note("an empty line ends the conversation")
    while True:
        if terminal:
            typer.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline().strip()
        except UnicodeDecodeError as error:
            raise OptionError("messages must be UTF-8", f"{error.reason} at byte {error.start}", "convert the input") from error
        if not line:
            return
        yield line
