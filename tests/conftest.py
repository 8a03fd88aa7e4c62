"""Fixtures that more than one test file needs, and the promise that nothing skips silently.

`backend` runs a test on every kernel backend that works here: the native one once per instruction set, Fortran once per compiler.
The variable SEPTET_EXPECT_BACKENDS (see tools/expected_backends.py) says which ones must work; another list fails the run at its start.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import needs
from septet import kernels
from variants import chosen, variants, working_backends

EXPECT_VARIABLE = "SEPTET_EXPECT_BACKENDS"


def covered_backends() -> list[str]:
    """Every backend that works here, with the instruction sets and compilers that some of them have, and what the other tests need."""
    names = working_backends()
    return sorted([*names, *(variant for name in names for variant in variants(name)), *working_frameworks()])


#: What tests need besides septet's backends, in the words of tools/expected_backends.py: name -> module.
FRAMEWORKS = {"torch": "torch", "transformers": "transformers", "gguf": "gguf", "llama-cpp": "llama_cpp"}


def working_frameworks() -> list[str]:
    """FRAMEWORKS, toolchains, compilers of GPU kernels and GPUs, as far as they work here: tests that need them are skipped without."""
    found = list(needs.working_toolchains())
    for name, module in FRAMEWORKS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        found.append(name)
    return [*found, *(needs.working_compilers() + needs.working_gpus() if "torch" in found else ())]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop when the list of backends is not the expected one."""
    expected = os.environ.get(EXPECT_VARIABLE)
    if expected is None:
        return
    wanted, found = sorted(filter(None, expected.split(","))), covered_backends()
    if wanted != found:
        why = {name: reason for name, reason in kernels.available_backends().items() if reason}
        pytest.exit(f"{EXPECT_VARIABLE}={','.join(wanted)}, but here are {','.join(found)} {why or ''}", returncode=1)


def demanded() -> str:
    """What this run demands, in words."""
    return f"{EXPECT_VARIABLE} demands: {', '.join(sorted(os.environ.get(EXPECT_VARIABLE, 'nothing').split(',')))}"


def pytest_report_header() -> list[str]:
    """Name what the run must cover, and what it does."""
    return [demanded(), f"septet backends: {', '.join(covered_backends())}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name it again where a reader looks."""
    covered = covered_backends()
    terminalreporter.write_line(demanded())
    terminalreporter.write_line(f"septet backends covered: {', '.join(covered)}")
    absent = [name for name in (*FRAMEWORKS, *needs.TOOLCHAINS, *needs.COMPILERS, *needs.GPUS) if name not in covered]
    terminalreporter.write_line(f"not here, so their tests are skipped: {', '.join(absent) or 'nothing'}")


def backend_choices() -> list[str]:
    """`reference`, and `native-avx2`, `fortran-flang` and the like for every variant."""
    return [choice for name in working_backends() for choice in [f"{name}-{variant}" for variant in variants(name)] or [name]]


@pytest.fixture(params=backend_choices())
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Every backend that works here: the native one once per instruction set, Fortran once per compiler."""
    name, _, variant = request.param.partition("-")
    with chosen(name, variant) as module:
        yield module


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20240607)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 2 layers with random weights, a byte tokenizer and a chat template, as `save_pretrained` writes them.

    hidden 64, intermediate 192, 4 heads, 2 key-value heads, vocabulary 260, tied embeddings. Treat it as read-only.
    """
    import torch
    import transformers

    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).eval().save_pretrained(path)
    byte_tokenizer(transformers).save_pretrained(path)
    return path


def byte_tokenizer(transformers: object) -> object:
    """A tokenizer whose tokens are the 256 bytes and four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["<user>"]}
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>", "<user>"])
    template = "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
