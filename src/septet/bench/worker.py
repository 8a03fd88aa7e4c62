"""A process that runs one model and obeys lines on stdin: how contenders take turns in memory of their own.

Answers are lines of JSON on the stdout it was started with; whatever libraries print goes to stderr. `prefill N` and `decode N`
answer tokens per second, `memory` the largest resident set so far in MB, `quit` ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["main"]

# Takes tokens, returns when the logits behind them are there; True starts a new text.
Step = Callable[[list[int], bool], None]


def main(engine: str, model: str, threads: int) -> None:
    """Load a model, answer {"type": ...}, then obey.

    Args:
        engine: "native", "transformers" or "llama.cpp".
        model: a directory, or a .gguf file for llama.cpp.
        threads: how many may work.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    step, kind = {"native": _native, "transformers": _transformers, "llama.cpp": _llama_cpp}[engine](Path(model), threads)
    answer({"type": kind})
    for line in sys.stdin:
        command, _, argument = line.partition(" ")
        if command.strip() == "quit":
            return
        if command.strip() == "memory":
            answer({"peak_rss_mb": _peak_rss_mb()})
        else:
            answer({"tok_per_s": {"prefill": _prefill, "decode": _decode}[command](step, int(argument))})


def _peak_rss_mb() -> float:
    """The largest resident set. Linux' own figure, because getrusage counts that of the process which started this one too."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _prefill(step: Step, count: int) -> float:
    started = time.perf_counter()
    step(_tokens(count), True)
    return count / (time.perf_counter() - started)


def _decode(step: Step, count: int) -> float:
    """One token after the other, behind a prompt of sixteen."""
    step(_tokens(16), True)
    started = time.perf_counter()
    for token in _tokens(count):
        step([token], False)
    return count / (time.perf_counter() - started)


def _tokens(count: int) -> list[int]:
    """Small ids, which every vocabulary has."""
    return [10 + 7 * index % 89 for index in range(count)]


def _native(path: Path, threads: int) -> tuple[Step, str]:
    from septet.checkpoint.source import read_config
    from septet.engine import Engine

    engine = Engine.load(path, threads=threads)
    text: list[int] = []

    def step(tokens: list[int], new: bool) -> None:
        nonlocal text
        if new:
            engine.reset()
        text = tokens if new else text + tokens
        engine.next_logits(text)

    quantization = read_config(path)["quantization_config"]
    return step, f"{quantization['code']} {quantization['bits_per_weight']}, head {quantization['head']}"


def _transformers(path: Path, threads: int) -> tuple[Step, str]:
    os.environ["SEPTET_THREADS"] = str(threads)
    import torch

    from septet.loading import load_model

    torch.set_num_threads(threads)
    model = load_model(path)
    cache = None

    def step(tokens: list[int], new: bool) -> None:
        nonlocal cache
        with torch.inference_mode():
            past = None if new else cache
            cache = model(input_ids=torch.tensor([tokens]), past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values

    quantization = getattr(model.config, "quantization_config", None)
    code = getattr(quantization, "code", None)
    return step, f"{code} {quantization.bits_per_weight}" if code else str(model.dtype).removeprefix("torch.")


def _llama_cpp(path: Path, threads: int) -> tuple[Step, str]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def step(tokens: list[int], new: bool) -> None:
        if new:
            model.reset()
        model.eval(tokens)

    return step, path.stem


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
