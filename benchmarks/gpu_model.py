"""Whole models on a GPU, one token at a time in a CUDA graph.

    python benchmarks/gpu_model.py text MODEL REFERENCE.json   greedy text with float activations beside another device's
    python benchmarks/gpu_model.py shaped [RESULTS.csv]        random weights in the shapes of an 8B model: bf16 and 3.5 bits

REFERENCE.json: prompt and tokens (ids, the prompt first), gaps (of the two largest logits, one per new token).
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from septet.gpu_engine import GpuEngine
from septet.layer import SeptetLinear

#: Logits of two devices differ by about this much of the largest one.
LOGITS_BOUND = 5e-4


class Decoder:
    """A model with a static cache, whose decoding step is a CUDA graph.

    Args:
        model: on the GPU.
        length: of the cache.
    """

    def __init__(self, model: torch.nn.Module, length: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros((1, 1), dtype=torch.long, device="cuda")
        self.position = torch.zeros((1,), dtype=torch.long, device="cuda")
        self.graph: torch.cuda.CUDAGraph | None = None

    def _step(self) -> torch.Tensor:
        here = {"cache_position": self.position, "position_ids": self.position[None]}
        return self.model(self.token, past_key_values=self.cache, use_cache=True, **here).logits[:, -1].float()

    def prefill(self, prompt: list[int]) -> torch.Tensor:
        """Logits after the prompt, which goes in token by token, so that nothing but the step is needed."""
        for index, token in enumerate(prompt):
            logits = self.step(token, index)
        return logits

    def step(self, token: int, position: int) -> torch.Tensor:
        """Logits after one more token."""
        self.token.fill_(token)
        self.position.fill_(position)
        if self.graph is None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step()
            # the steps so far have left their traces
            self.cache.reset()
        self.graph.replay()
        return self.logits

    def tokens_per_second(self, position: int, rounds: int = 5, steps: int = 30) -> float:
        """Median speed of some rounds of steps."""
        speeds = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for offset in range(steps):
                self.position.fill_(position + offset)
                self.graph.replay()
            end.record()
            end.synchronize()
            speeds.append(steps / begin.elapsed_time(end) * 1e3)
        return statistics.median(speeds)


def compare(logits_after: Callable[[list[int]], torch.Tensor], wanted: dict) -> int:
    """How many greedy tokens are the reference's. Stops unless the first other one is within the bound of a tie."""
    start = len(wanted["prompt"])
    for index, token in enumerate(wanted["tokens"][start:]):
        logits = logits_after(wanted["tokens"][: start + index])
        if int(logits.argmax()) != token:
            bound = LOGITS_BOUND * float(logits.abs().max())
            print(f"first other token: {index}, top-2 gap there {wanted['gaps'][index]:.2e}, bound {bound:.2e}")
            assert wanted["gaps"][index] <= bound
            return index
    return len(wanted["tokens"]) - start


def text(directory: str, reference: Path) -> None:
    """Greedy text with float activations, compared, whole texts and step by step; then speed with int8 activations."""
    wanted = json.loads(reference.read_text())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).cuda().eval()
    packed = [module for module in model.modules() if isinstance(module, SeptetLinear)]
    for module in packed:
        module.activations = "float"
    with torch.inference_mode():

        def whole(tokens: list[int]) -> torch.Tensor:
            return model(torch.tensor([tokens], device="cuda"), use_cache=False).logits[0, -1].float()

        print(f"whole texts: {compare(whole, wanted)} greedy tokens equal")
        decoder = Decoder(model, 512)
        decoder.prefill(wanted["prompt"][:-1])
        print(f"steps: {compare(lambda tokens: decoder.step(tokens[-1], len(tokens) - 1), wanted)} greedy tokens equal")
        print(f"float activations, float32: {decoder.tokens_per_second(200):.0f} tok/s")
        for module in packed:
            module.activations = "int8"
        for dtype in (torch.float32, torch.bfloat16):
            decoder = Decoder(model.to(dtype), 512)
            decoder.prefill(wanted["prompt"])
            print(f"int8 activations, {dtype}: {decoder.tokens_per_second(200):.0f} tok/s")


def random_linear(inputs: int, outputs: int, bits: int = 7) -> SeptetLinear:
    """A packed layer of random bytes."""
    entry = {"code": "trellis", "bits_per_pair": bits, "in_features": inputs, "out_features": outputs}
    layer = SeptetLinear(entry | {"input_block": 256, "output_block": 256}, dtype=torch.bfloat16, device="cuda")
    layer.weight.data.random_(0, 256)
    layer.weight_scale.data.fill_(1 / (40 * inputs**0.5))
    layer.weight_input_scale.data.fill_(1)
    layer.activation_scale = "block"
    return layer


def shaped_model() -> LlamaForCausalLM:
    """An 8B-shaped Llama of random weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def pack(model: LlamaForCausalLM) -> None:
    """Put packed layers of random bytes in the places of the dense ones."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for key, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, key, random_linear(child.in_features, child.out_features))


def engine_speed(engine: GpuEngine, position: int, rounds: int = 5, steps: int = 30) -> float:
    """Median tokens per second of some rounds of greedy steps."""
    speeds = []
    for _ in range(rounds):
        engine.kernel.position.move_to(position)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            engine.step()
        end.record()
        end.synchronize()
        speeds.append(steps / begin.elapsed_time(end) * 1e3)
    return statistics.median(speeds)


def decoder_speed(model: LlamaForCausalLM, position: int) -> float:
    """The same through transformers: static cache, CUDA graph."""
    decoder = Decoder(model, 512)
    decoder.prefill([1, 2, 3])
    return decoder.tokens_per_second(position)


@torch.inference_mode()
def shaped(out: Path | None, position: int = 100) -> None:
    """Decoding speed of an 8B-shaped Llama, bf16 and packed."""
    model, rows = shaped_model(), []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    machine |= {"commit": commit, "command": " ".join(["python", *sys.argv])}

    def report(name: str, speed: float) -> None:
        memory, ratio = torch.cuda.memory_allocated() / 1e9, speed / (rows[0]["tokens_per_second"] if rows else speed)
        rows.append({"name": name, "tokens_per_second": round(speed, 1), "of_bf16": round(ratio, 2), "gb": round(memory, 1)} | machine)
        print(f"8B-shaped, {name}: {speed:.1f} tok/s ({ratio:.2f} x), {memory:.1f} GB", flush=True)

    report("bf16, transformers", decoder_speed(model, position))
    pack(model)
    report("3.5 bits, transformers", decoder_speed(model, position))
    engine = GpuEngine(model)
    report("3.5 bits, one launch a token", engine_speed(engine, position))
    engine = GpuEngine(model, 8192)
    report("3.5 bits, one launch a token, 8000 tokens before it", engine_speed(engine, 8000))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["shaped"] and len(sys.argv) <= 3:
        shaped(Path(sys.argv[2]) if len(sys.argv) == 3 else None)
    elif sys.argv[1:2] == ["text"] and len(sys.argv) == 4:
        text(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
