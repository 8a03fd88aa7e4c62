"""Damaged, contradictory and hostile checkpoints, loaded by transformers: an error that says what is wrong, before the model is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from septet.checkpoint import crc32_text
from septet.errors import CheckpointError, SeptetError, SpecVersionError, UnsupportedModelError
from septet.integrations.huggingface import SeptetConfig
from small_models import load, logits, save

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A checkpoint as `save_pretrained` writes it."""
    save("llama", tmp_path / "dense")
    load("llama", tmp_path / "dense", quantization_config=SeptetConfig()).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def change_config(path: Path, change: Callable[[dict], object]) -> None:
    """Change `quantization_config` of a checkpoint in place."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def change_tensors(path: Path, change: Callable[[dict], object]) -> None:
    """Change tensors of a checkpoint, and its checksums with them, so that only the change itself can be noticed."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    checksums = {key: crc32_text(tensor.reshape(-1).view(torch.uint8).numpy()) for key, tensor in tensors.items()}
    change_config(path, lambda config: config.update(crc32=checksums))


def refused(path: Path, error: type[SeptetError], match: str) -> None:
    """Loading raises this error with its three parts."""
    with pytest.raises(error, match=match) as caught:
        load("llama", path)
    assert caught.value.requirement
    assert caught.value.hint


def test_a_tensor_in_two_files(packed) -> None:
    tensors = load_file(packed / "model.safetensors")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    wrong = {LAYER + ".weight": tensors[LAYER + ".weight"] ^ 1, "model.norm.weight": tensors.pop("model.norm.weight")}
    for name, held in zip(names, (wrong, tensors)):
        save_file(held, packed / name, {"format": "pt"})
    (packed / "model.safetensors").unlink()
    weight_map = dict.fromkeys(tensors, names[1]) | {"model.norm.weight": names[0]}
    (packed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused(packed, CheckpointError, f"must hold tensors that no other file holds, got {LAYER}.weight, one in")


@pytest.mark.parametrize("position", [0.2, 0.9])
def test_a_flipped_bit(packed, position) -> None:
    file = packed / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(len(data) * position)] ^= 4
    file.write_bytes(data)
    refused(packed, CheckpointError, "must have the CRC .* of config.json, got")


def test_a_truncated_file(packed) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(packed, CheckpointError, "must have .* bytes, got .*; .* is truncated")


@pytest.mark.parametrize("version", [1, "0", None])
def test_another_version_of_the_format(packed, version) -> None:
    change_config(packed, lambda config: config.update(format_version=version))
    refused(packed, SpecVersionError, "format_version of the checkpoint must be 0, got .*; update septet")


CONTRADICTIONS = {
    "shape": (lambda c: c["layers"][LAYER].update(out_features=128), "must be uint8 .* as config.json says"),
    "inputs": (lambda c: c["layers"][LAYER].update(in_features=68), "as config.json says"),
    "bits": (lambda c: c["layers"][LAYER].update(bits_per_pair=6), "as config.json says"),
    "code": (lambda c: c["layers"][LAYER].update(code="split"), "scale_rows|weight_scale"),
    "text": (lambda c: c["layers"][LAYER].update(in_features="64"), "in_features must be a whole number"),
    "block": (lambda c: c["layers"][LAYER].update(input_block=48), "input_block must be a power of two"),
    "unknown module": (lambda c: c["layers"].update({"model.layers.7.x": c["layers"][LAYER]}), "must be modules of the model"),
    "norm": (lambda c: c["layers"].update({"model.norm": c["layers"][LAYER]}), "must be a linear layer|as config.json says|must hold"),
    "no layers": (lambda c: c.pop("layers"), "must list its layers"),
    "layers as list": (lambda c: c.update(layers=[1]), "must list its layers"),
    "entry as text": (lambda c: c["layers"].update({LAYER: "x"}), "must list its layers"),
    "tied as text": (lambda c: c["layers"]["model.embed_tokens"].update(tied="lm_head"), "tied of .* must list module names"),
    "no checksums": (lambda c: c.pop("crc32"), "must list a crc32"),
    "one checksum less": (lambda c: c["crc32"].pop("model.norm.weight"), "must list a crc32 of model.norm.weight"),
    "one checksum more": (lambda c: c["crc32"].update(x="00000000"), "must hold x, as config.json says"),
    "option": (lambda c: c.update(activations="int2"), "activations must be one of int8, float, got int2 in config.json"),
    "type": (lambda c: c.update(bits_per_weight=[3.5]), "must have the right types"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(packed, name) -> None:
    change, match = CONTRADICTIONS[name]
    change_config(packed, change)
    refused(packed, CheckpointError, match)


def test_a_layer_that_the_table_forgets(packed) -> None:
    change_config(packed, lambda config: config["layers"].pop(LAYER))
    with pytest.raises((CheckpointError, RuntimeError), match="must have the shape|mismatched|size"):
        load("llama", packed)


TENSORS = {
    "missing companion": (lambda t: t.pop(f"{LAYER}.weight_scale"), f"must hold {LAYER}.weight_scale"),
    "missing weight": (lambda t: t.pop(f"{LAYER}.weight"), f"must hold {LAYER}.weight"),
    "other dtype": (lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].float()}), "must be float16"),
    "other shape": (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :112].clone()}), "must be uint8"),
    "no signs": (lambda t: t["model.embed_tokens.weight_input_scale"].mul_(0.5), "must be 1 or -1"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(packed, name) -> None:
    change, match = TENSORS[name]
    change_tensors(packed, change)
    refused(packed, CheckpointError, match)


def test_an_unquantized_tensor_of_another_shape(packed) -> None:
    change_tensors(packed, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises((CheckpointError, RuntimeError), match="model.norm.weight|ismatch"):
        load("llama", packed)


def test_another_architecture(packed) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused(packed, CheckpointError, "must have the shape .* that the model asks for")


def test_pickle_is_refused(packed) -> None:
    torch.save(load_file(packed / "model.safetensors"), packed / "pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, ValueError, OSError), match="safetensors|torch"):
        load("llama", packed, use_safetensors=False)


def test_code_in_a_checkpoint_is_not_executed(packed, tmp_path) -> None:
    (packed / "modeling_evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((packed / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (packed / "config.json").write_text(json.dumps(config))
    assert logits(transformers.AutoModelForCausalLM.from_pretrained(packed)).shape == (2, 12, 260)
    assert not (tmp_path / "executed").exists()


def test_a_model_that_would_be_spread_while_it_is_quantized(tmp_path) -> None:
    save("llama", tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="must be on one device"):
        device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        load("llama", tmp_path / "dense", quantization_config=SeptetConfig(), device_map=device_map)
