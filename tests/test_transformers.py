"""septet in transformers: quantize while loading, save, load, generate, go back to dense; the bytes are those of the command line."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import septet
from septet import loading, model
from septet.checkpoint import QuantizeOptions, verify
from septet.checkpoint.stream import Hooks, quantize_checkpoint
from septet.errors import OptionError, UnsupportedModelError
from septet.integrations.huggingface import SeptetConfig
from septet.layer import SeptetEmbedding, SeptetLinear
from small_models import FAMILIES, build, load, logits, save

#: T5 ties four modules, and its config cannot say otherwise.
CASES = [(family, head) for family in FAMILIES for head in ("int8", "trellis", "keep") if (family, head) != ("t5", "trellis")]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_round_trip_is_exact(family, head, tmp_path) -> None:
    dense = build(family)
    save(family, tmp_path / "dense")
    quantized = load(family, tmp_path / "dense", quantization_config=SeptetConfig(head=head))
    before = logits(quantized)
    assert (before - logits(dense)).norm() < 0.5 * logits(dense).norm()
    quantized.save_pretrained(tmp_path / "a")
    again, report = load(family, tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(again), before)
    assert not any(tensor.requires_grad for _, module in model.septet_modules(again) for tensor in module._tensors() if tensor is not None)
    again.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "septet.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_bfloat16(family, tmp_path) -> None:
    save(family, tmp_path / "dense", torch.bfloat16)
    quantized = load(family, tmp_path / "dense", quantization_config=SeptetConfig())
    assert quantized.dtype == torch.bfloat16
    before = logits(quantized)
    assert before.dtype == torch.bfloat16
    quantized.save_pretrained(tmp_path / "packed")
    assert load_file(tmp_path / "packed" / "model.safetensors").keys() == quantized.config.quantization_config.crc32.keys()
    again = load(family, tmp_path / "packed")
    assert again.dtype == torch.bfloat16
    assert again.config.dtype == torch.bfloat16
    assert torch.equal(logits(again), before)
    assert logits(load(family, tmp_path / "packed", dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(("family", "head"), CASES)
def test_dequantize_gives_the_dense_classes_back(family, head, tmp_path) -> None:
    save(family, tmp_path / "dense")
    load(family, tmp_path / "dense", quantization_config=SeptetConfig(head=head, activations="float")).save_pretrained(tmp_path / "packed")
    packed = load(family, tmp_path / "packed")
    before = logits(packed)
    packed.dequantize()
    modules = {name: type(module) for name, module in build(family).named_modules()}
    assert {name: type(module) for name, module in packed.named_modules()} == modules
    assert (logits(packed) - before).abs().max() <= 1e-4 * before.abs().max()
    packed.save_pretrained(tmp_path / "dense-again")
    assert torch.equal(logits(load(family, tmp_path / "dense-again")), logits(packed))


@pytest.mark.parametrize(
    "options",
    [
        {"head": "int8"},
        {"head": "trellis", "bits_per_weight": 3.0, "seed": 5},
        {"head": "keep", "bits_per_weight": 4.0, "rotation_block": 16},
        {"code": "split"},
        {"code": "split", "symmetric": True, "granularity": "group", "group_size": 32},
        {"code": "split", "granularity": "tensor", "range_method": "minmax"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])
def test_same_bytes_as_the_command_line(family, options, tmp_path) -> None:
    dense = save(family, tmp_path / "dense", torch.bfloat16)
    quantize_checkpoint(dense, tmp_path / "streamed", QuantizeOptions(**options), Hooks(plan=loading.plan_checkpoint))
    quantized = load(family, dense, quantization_config=SeptetConfig(**options))
    quantized.save_pretrained(tmp_path / "saved")
    streamed, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "saved"))
    assert streamed.keys() == saved.keys()
    for key in streamed:
        assert streamed[key].dtype == saved[key].dtype
        assert torch.equal(streamed[key].view(torch.uint8), saved[key].view(torch.uint8)), key
    described = [loading.read_config(tmp_path / name)["quantization_config"] for name in ("streamed", "saved")]
    assert described[0] == described[1]
    assert torch.equal(logits(load(family, tmp_path / "streamed")), logits(quantized))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_is_the_same_after_reloading(family, tmp_path) -> None:
    save(family, tmp_path / "dense")
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    quantized = load(family, tmp_path / "dense", quantization_config=SeptetConfig())
    before = quantized.generate(**ids)
    assert before.shape == (1, 11)
    quantized.save_pretrained(tmp_path / "packed")
    again = load(family, tmp_path / "packed")
    assert torch.equal(again.generate(**ids), before)
    assert torch.equal(again.generate(**ids, cache_implementation="static", disable_compile=True), before)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])
def test_compile_the_whole_model(family, tmp_path) -> None:
    torch.compiler.reset()
    save(family, tmp_path / "dense")
    quantized = load(family, tmp_path / "dense", quantization_config=SeptetConfig())
    expected = logits(quantized)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=torch.arange(3, 27).reshape(2, 12), use_cache=False).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_activations_are_a_choice_of_the_reader(tmp_path) -> None:
    save("llama", tmp_path / "dense")
    quantized = load("llama", tmp_path / "dense", quantization_config=SeptetConfig(activations="float"))
    exact = logits(quantized)
    quantized.save_pretrained(tmp_path / "packed")
    again = load("llama", tmp_path / "packed")
    assert torch.equal(logits(again), exact)
    model.set_activations(again, "int8")
    rounded = logits(again)
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    assert torch.equal(logits(loading.load_model(tmp_path / "packed", activations="int8")), rounded)
    with pytest.raises(OptionError, match="activations must be int8 or float, got int4"):
        model.set_activations(again, "int4")


@pytest.mark.parametrize("family, head", [("llama", "int8"), ("gpt2", "int8"), ("bert", "keep"), ("llama-untied", "trellis")])
def test_the_base_model_alone(family, head, tmp_path) -> None:
    save(family, tmp_path / "dense", torch.bfloat16)
    whole = load(family, tmp_path / "dense", quantization_config=SeptetConfig(head=head))
    whole.save_pretrained(tmp_path / "packed")
    base = transformers.AutoModel.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = whole.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(base(input_ids=ids).last_hidden_state, expected)


def test_modules_that_stay(tmp_path) -> None:
    save("llama", tmp_path / "dense")
    config = SeptetConfig(head="keep", modules_to_not_convert=["down_proj", "model.layers.0.self_attn.q_proj"])
    quantized = load("llama", tmp_path / "dense", quantization_config=config)
    stay = {name for name, module in quantized.named_modules() if type(module) is torch.nn.Linear}
    assert stay == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"}
    quantized.save_pretrained(tmp_path / "packed")
    again = load("llama", tmp_path / "packed")
    assert torch.equal(logits(again), logits(quantized))
    assert again.config.quantization_config.modules_to_not_convert == config.modules_to_not_convert


def test_what_is_tied_stays_one_tensor(tmp_path) -> None:
    save("t5", tmp_path / "dense")
    quantized = load("t5", tmp_path / "dense", quantization_config=SeptetConfig())
    quantized.save_pretrained(tmp_path / "packed")
    keys = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert not any(key.startswith(("lm_head", "encoder.embed", "decoder.embed")) for key in keys)
    for tied in (quantized, load("t5", tmp_path / "packed")):
        owner = tied.get_submodule("shared")
        assert isinstance(owner, SeptetEmbedding)
        assert isinstance(tied.lm_head, SeptetLinear)
        for other in (tied.lm_head, tied.encoder.embed_tokens, tied.decoder.embed_tokens):
            assert all(a is b for a, b in zip(other._tensors(), owner._tensors()))


def test_sharded_checkpoints(tmp_path) -> None:
    save("llama", tmp_path / "dense")
    quantized = load("llama", tmp_path / "dense", quantization_config=SeptetConfig())
    quantized.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) > 1
    report = verify(tmp_path / "packed")
    assert not report.problems and report.files == len(shards) + 3
    assert torch.equal(logits(load("llama", tmp_path / "packed")), logits(quantized))


def test_verify_finds_damage_in_a_saved_model(tmp_path) -> None:
    save("llama", tmp_path / "dense")
    quantized = copy.deepcopy(load("llama", tmp_path / "dense", quantization_config=SeptetConfig()))
    quantized.save_pretrained(tmp_path / "packed")
    assert not verify(tmp_path / "packed").problems
    file = tmp_path / "packed" / "generation_config.json"
    file.write_text(file.read_text() + " ")
    assert [str(problem)[:40] for problem in verify(tmp_path / "packed").problems] == ["generation_config.json must have the SHA"]
    quantized.dequantize()
    quantized.save_pretrained(tmp_path / "dense-again")
    assert not (tmp_path / "dense-again" / "septet.json").exists()


def test_a_pushed_model_verifies(tmp_path, monkeypatch) -> None:
    save("llama", tmp_path / "dense")
    quantized = load("llama", tmp_path / "dense", quantization_config=SeptetConfig())
    sent = tmp_path / "sent"
    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
    modeling = transformers.modeling_utils
    for name, stand_in in (("hf_api", lambda: hub), ("create_repo", hub.create_repo), ("create_and_tag_model_card", lambda *_, **__: card)):
        monkeypatch.setattr(modeling, name, stand_in, raising=False)
    monkeypatch.setattr(type(quantized), "_upload_modified_files", lambda self, folder, *_, **__: shutil.copytree(folder, sent))
    # The third argument after the folder is push_to_hub.
    quantized.save_pretrained(tmp_path / "packed", True, None, True)
    assert not verify(sent).problems
    assert (sent / "septet.json").read_bytes() == (tmp_path / "packed" / "septet.json").read_bytes()
    assert "_upload_modified_files" not in vars(quantized)


def test_what_another_process_saves_gets_no_hashes(tmp_path) -> None:
    save("llama", tmp_path / "dense")
    quantized = load("llama", tmp_path / "dense", quantization_config=SeptetConfig())
    quantized.save_pretrained(tmp_path / "packed", False)
    assert not (tmp_path / "packed" / "septet.json").exists()


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_mixtures_with_fused_experts_are_refused(family) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 1}
    config = getattr(transformers, f"{family}Config")(**sizes, num_local_experts=2, num_experts=2)
    with torch.device("meta"):
        mixture = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(UnsupportedModelError, match="experts must be linear layers"):
        model.plan(mixture, QuantizeOptions())


def test_a_head_tied_to_several_modules_is_not_cut_loose() -> None:
    with pytest.raises(UnsupportedModelError, match="tied to one embedding only"):
        model.plan(build("t5"), QuantizeOptions(head="trellis"))


def test_unknown_options_are_errors() -> None:
    with pytest.raises(OptionError, match="got bits"):
        SeptetConfig(bits=3.5)
    with pytest.raises(OptionError, match="head must be one of"):
        SeptetConfig(head="int4")
    assert "SeptetConfig(code='trellis'" in repr(SeptetConfig())


@pytest.mark.parametrize(
    "imports",
    [
        "import septet, transformers",
        "import septet, transformers.modeling_utils",
        "import transformers.modeling_utils, septet",
    ],
)
def test_registered_in_either_order(imports, tmp_path) -> None:
    code = f"{imports}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\nprint('septet' in known)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert result.stdout.strip() == "True", result.stderr


def _environment() -> dict[str, str]:
    """The environment of this process, with septet findable from anywhere."""
    return os.environ | {"PYTHONPATH": str(Path(septet.__file__).parent.parent)}
