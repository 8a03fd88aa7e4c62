"""Tensor parallelism of transformers: two processes on this machine answer like one, and cuts through a tile are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import septet
from septet.integrations.huggingface import SeptetConfig

# The mesh of the model keeps torch's gloo groups alive after destroy_process_group. One of their threads that still holds a tensor when the
# interpreter ends aborts the process (torch 2.13, without septet too: github.com/pytorch/pytorch/pull/179291), so a rank ends without that.
WORKER = """
import os, sys, torch, septet
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
path, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits
if torch.distributed.get_rank() == 0:
    shapes = {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if hasattr(p, "to_local")}
    torch.save((logits, shapes), out)
torch.distributed.destroy_process_group()
os._exit(0)
"""


def quantized(path: Path, **options):
    """A LLaMA with biases whose sizes can be cut in two, quantized and saved; returns its logits in one process."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, attention_bias=True, tie_word_embeddings=options.get("head", "int8") == "int8",
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    dense.save_pretrained(path / "dense")
    model = transformers.LlamaForCausalLM.from_pretrained(path / "dense", quantization_config=SeptetConfig(**options))
    model.save_pretrained(path / "packed")
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits


def run_ranks(path: Path) -> subprocess.CompletedProcess:
    """Load the model on two ranks; rank 0 saves its logits and the shapes of its slices."""
    (path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(Path(septet.__file__).parent.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path / "worker.py"]
    return subprocess.run([*command, path / "packed", path / "out.pt"], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "options",
    [
        {"rotation_block": 64, "activation_scale": "block", "activations": "float"},
        {"code": "split", "granularity": "group", "group_size": 32, "head": "keep", "activations": "int8"},
    ],
    ids=["trellis", "split-group"],
)
def test_two_ranks_answer_like_one(options, tmp_path) -> None:
    expected = quantized(tmp_path, **options)
    result = run_ranks(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    logits, shapes = torch.load(tmp_path / "out.pt")
    # Ranks add up in another order; where that moves an activation across a rounding boundary, it moves by a whole step.
    tolerance = 1e-5 if options["activations"] == "float" else 2e-2
    assert (logits - expected).norm() <= tolerance * expected.norm()
    layer = "model.layers.0.self_attn"
    assert shapes[f"{layer}.q_proj.weight"] == (2, 128 // 4 * 112)
    assert shapes[f"{layer}.o_proj.weight"] == (2, 128 // 4 * 112)
    if options.get("code") != "split":
        assert shapes[f"{layer}.q_proj.weight_scale"] == (128,)
        assert shapes[f"{layer}.o_proj.weight_input_scale"] == (128,)
        assert f"{layer}.o_proj.weight_scale" not in shapes


def test_cuts_through_a_rotation_block_are_refused(tmp_path) -> None:
    quantized(tmp_path, rotation_block=128)
    result = run_ranks(tmp_path)
    assert result.returncode != 0
    assert "tensor-parallel slices must be multiples of 128" in result.stderr
