"""A model directory, quantized while transformers loads it, saved, loaded again, and asked to go on with a sentence.

python examples/quantize_in_transformers.py demo/original my-model
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from septet.integrations.huggingface import SeptetConfig


def main(source: str, out: str) -> None:
    """Quantize `source` into `out`; both are directories."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=SeptetConfig(code="trellis")).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        before = model(**prompt).logits
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    again = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.inference_mode():
        print("same logits after reloading:", torch.equal(before, again(**prompt).logits))
    print(tokenizer.decode(again.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:3])
