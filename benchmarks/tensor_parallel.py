"""A packed model cut over several GPUs by transformers, beside the same model on one: logits within a bound, and the same greedy text.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py [--model DIR] [--device cuda] [--out FILE]

Without a model, one with random weights is made and quantized, in shapes that two ranks can cut. Every rank also loads the whole model,
so the ranks' own answers are compared as well. Ranks add up products in another order; where that moves an activation across a rounding
boundary of int8, it moves by a whole step, and in bfloat16 each sum is rounded. Status 1 if a bound is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from septet import loading
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.stream import Hooks, quantize_checkpoint
from septet.cli.device import quantizer_on
from septet.layer import SeptetLinear

#: (dtype of the model, activations) -> largest norm of the difference of logits, in norms of the logits.
BOUNDS = {
    (torch.float32, "float"): 1e-5,
    (torch.float32, "int8"): 5e-2,
    (torch.bfloat16, "float"): 5e-2,
    (torch.bfloat16, "int8"): 5e-2,
}
TEXT_TOKENS = 32


def make_model(place: Path, device: str) -> None:
    """A LLaMA with random weights, quantized without calibration."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "dense")
    hooks = Hooks(plan=loading.plan_checkpoint, quantizer=quantizer_on(device))
    quantize_checkpoint(place / "dense", place / "packed", QuantizeOptions(), hooks)


def answers(model: torch.nn.Module, activations: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two windows of 48 tokens, float32 on the processor; and a greedy text."""
    for module in model.modules():
        if isinstance(module, SeptetLinear):
            module.activations = activations
    windows = torch.randint(3, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode():
        logits = model(windows).logits.float().cpu()
        text = model.generate(
            windows[:1, :8], attention_mask=torch.ones_like(windows[:1, :8]), do_sample=False, max_new_tokens=TEXT_TOKENS, pad_token_id=2
        )
    return logits, text[0, 8:].cpu()


def compare(one: tuple[torch.Tensor, torch.Tensor], cut: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """How far the answers of the cut model are from those of the whole one."""
    (logits, text), (cut_logits, cut_text) = one, cut
    length = min(len(text), len(cut_text))
    same = int((text[:length] == cut_text[:length]).int().cumprod(0).sum())
    return {
        "relative_difference": float((cut_logits - logits).norm() / logits.norm()),
        "largest_difference": float((cut_logits - logits).abs().max()),
        "largest_logit": float(logits.abs().max()),
        "same_choices": float((cut_logits.argmax(-1) == logits.argmax(-1)).float().mean()),
        "greedy_tokens_equal": same,
        "of": length,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if arguments.device == "cuda" else "cpu"
    if arguments.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    # Every rank has the name of rank 0's folder; all are on one host.
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    if rank == 0 and arguments.model is None:
        make_model(Path(folder[0]), device)
    dist.barrier()
    path, rows = arguments.model or Path(folder[0]) / "packed", []
    for dtype in (torch.float32, torch.bfloat16):
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        expected = {kind: answers(whole, kind, device) for kind in ("float", "int8")}
        del whole
        cut = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=DistributedConfig(tp_size=ranks, tp_plan="auto"))
        sliced = [name for name, parameter in cut.named_parameters() if hasattr(parameter, "to_local") and name.endswith("proj.weight")]
        for kind, one in expected.items():
            row = compare(one, answers(cut.eval(), kind, device))
            fine = row["relative_difference"] <= BOUNDS[dtype, kind] and len(sliced) > 0
            rows.append({"dtype": str(dtype)[6:], "activations": kind, "rank": rank, "ranks": ranks, "cut_layers": len(sliced)} | row)
            rows[-1] |= {"bound": BOUNDS[dtype, kind], "within": fine}
        del cut
    gathered: list = [None] * ranks
    dist.all_gather_object(gathered, rows)
    dist.destroy_process_group()
    if rank == 0:
        lines = [json.dumps(row) for part in gathered for row in part]
        print("\n".join(lines), flush=True)
        if arguments.out is not None:
            arguments.out.write_text("\n".join(lines) + "\n")
    return int(not all(row["within"] for part in gathered for row in part))


if __name__ == "__main__":
    raise SystemExit(main())
