"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "ActivationOption",
    "Activations",
    "DeviceOption",
    "EngineChoice",
    "EngineOption",
    "JsonOption",
    "MinPOption",
    "ModelArgument",
    "PackedArgument",
    "PenaltyOption",
    "SeedOption",
    "TemperatureOption",
    "TokensOption",
    "TopKOption",
    "TopPOption",
]


class Activations(str, Enum):
    """What the quantized products do with their inputs."""

    int8 = "int8"
    float = "float"


class EngineChoice(str, Enum):
    """What runs the model."""

    auto = "auto"
    native = "native"
    transformers = "transformers"


ModelArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A septet directory, a Hugging Face directory or a .gguf file.")]
PackedArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A septet directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ActivationOption = Annotated[Activations | None, typer.Option("--activations", help="Round inputs to int8? Default: what the model says.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="Stop after this many tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
TopKOption = Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: all.")]
TopPOption = Annotated[float, typer.Option(help="Draw among the likeliest tokens that hold this share of the probability.")]
MinPOption = Annotated[float, typer.Option("--min-p", help="Leave out tokens less likely than this share of the likeliest.")]
PenaltyOption = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: tokens already in the text become less likely.")]
EngineOption = Annotated[EngineChoice, typer.Option("--engine", help="auto: the native engine where it knows the model.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N: where the model runs.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the draws.")]
