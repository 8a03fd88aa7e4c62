"""`septet run`: complete a raw prompt; stdout gets the completion and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from septet.cli import options
from septet.cli.app import app
from septet.cli.model import load
from septet.cli.output import print_json

__all__ = ["run"]


@app.command()
def run(
    directory: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The raw prompt; `septet chat` uses the chat template.")],
    max_new_tokens: options.TokensOption = 128,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = 0,
    min_p: options.MinPOption = 0.0,
    repetition_penalty: options.PenaltyOption = 1.0,
    activations: options.ActivationOption = None,
    engine: options.EngineOption = options.EngineChoice.auto,
    device: options.DeviceOption = "cpu",
    as_json: options.JsonOption = False,
) -> None:
    """Complete a prompt."""
    from septet import generate

    sampling = generate.Sampling(max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    model, tokenizer = load(directory, activations, engine, device)
    if as_json:
        completion = generate.complete(model, tokenizer, prompt, sampling)
        print_json({
            "prompt": prompt,
            "completion": completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "tokens": completion.tokens,
            "prompt_seconds": completion.prompt_seconds,
            "seconds": completion.seconds,
            "tokens_per_second": completion.tokens_per_second,
        })  # fmt: skip
        return
    generate.complete(model, tokenizer, prompt, sampling, on_text=lambda piece: typer.echo(piece, nl=False))
    typer.echo()
