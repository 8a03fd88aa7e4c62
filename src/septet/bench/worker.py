"""A process that runs one model and obeys lines on stdin: how contenders take turns in memory of their own.

Answers are lines of JSON on the stdout it was started with; whatever libraries print goes to stderr. The first one says what was
loaded, how fast, and into how much memory. `prefill N` and `decode N` answer tokens per second, `memory` the largest resident set
so far in MB, `idle SECONDS` the processor time of doing nothing, `quit` ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from septet.errors import OptionError

__all__ = ["main"]

_LLAMA_CONTEXT, _LLAMA_BATCH = 2048, 512

# Takes tokens, returns when the logits behind them are there; True starts a new text.
Step = Callable[[list[int], bool], None]
Load = Callable[[], tuple[Step, str]]


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

    load = {"native": _native, "transformers": _transformers, "llama.cpp": _llama_cpp}[engine](Path(model), threads)
    before, started = _rss_mb("VmRSS"), time.perf_counter()
    step, kind = load()
    seconds, grown = time.perf_counter() - started, _rss_mb("VmRSS") - before
    answer({"type": kind, "load_seconds": seconds, "file_mb": _file_mb(Path(model)), "load_rss_mb": grown})
    for line in sys.stdin:
        command, _, argument = line.partition(" ")
        if command.strip() == "quit":
            return
        if command.strip() == "memory":
            answer({"peak_rss_mb": _rss_mb("VmHWM")})
        elif command == "idle":
            answer({"cpu_seconds": _idle(float(argument))})
        else:
            answer({"tok_per_s": {"prefill": _prefill, "decode": _decode}[command](step, int(argument))})


def _rss_mb(figure: str) -> float:
    """The resident set, now (VmRSS) or at most (VmHWM). Linux' own figures, because getrusage counts the starting process too."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[figure].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _idle(seconds: float) -> float:
    """Processor time of the whole process, all threads, while nobody asks for anything."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def _file_mb(model: Path) -> float:
    """Weights on disk."""
    files = [model] if model.is_file() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 2**20


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


# Each of these imports what it needs, and returns the function that loads the model: imports are not timed.


def _native(path: Path, threads: int) -> Load:
    from septet.checkpoint.source import read_config
    from septet.engine import Engine

    def load() -> tuple[Step, str]:
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

    return load


def _transformers(path: Path, threads: int) -> Load:
    os.environ["SEPTET_THREADS"] = str(threads)
    import torch

    from septet.loading import load_model

    def load() -> tuple[Step, str]:
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

    return load


def _llama_cpp(path: Path, threads: int) -> Load:
    import llama_cpp

    def load() -> tuple[Step, str]:
        model = llama_cpp.Llama(str(path), n_ctx=_LLAMA_CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

        def step(tokens: list[int], new: bool) -> None:
            # Its own functions, without what its Python class does around them: what llama-bench times.
            context = model.ctx  # goes when `model` goes
            if new:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            for first in range(0, len(tokens), _LLAMA_BATCH):
                part = tokens[first : first + _LLAMA_BATCH]
                array = (llama_cpp.llama_token * len(part))(*part)
                status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part)))
                if status != 0:
                    raise OptionError("llama.cpp must be able to decode", f"status {status}", "time fewer tokens")

        return step, path.stem

    return load


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
