"""The command line: one file per command, all of them thin. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

from septet.cli import bench, chat, demo, eval, info, inspect, quantize, run, verify  # noqa: F401  (each registers its command)
from septet.cli.app import app, main

__all__ = ["app", "main"]
