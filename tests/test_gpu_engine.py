"""What can be tested of decoding on a GPU without one: which models it takes, and that the kernel is what Python thinks it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from needs import needs, skip_module_without

skip_module_without("triton", "test_engine.py tests the engine of the processor")

from cuda_layout import same_layout, stack_bytes  # noqa: E402
from packed_models import FAMILIES, packed_model  # noqa: E402
from septet import generate  # noqa: E402
from septet.cli.model import load  # noqa: E402
from septet.cli.options import EngineChoice  # noqa: E402
from septet.errors import OptionError, UnsupportedModelError  # noqa: E402
from septet.gpu import compiled, driver, token  # noqa: E402
from septet.gpu.position import Position  # noqa: E402
from septet.gpu_engine.reading import read_blocks, read_rotary, read_sizes  # noqa: E402

needs_nvrtc = needs("nvrtc", "other tests here know the kernel's structures and memory")


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(family) -> None:
    model = packed_model(family)
    sizes, config = read_sizes(model, 100), model.config
    assert (sizes.hidden, sizes.heads, sizes.kv_heads) == (config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert sizes.heads * sizes.head == model.model.layers[0].self_attn.q_proj.out_features
    assert sizes.epsilon == config.rms_norm_eps and sizes.scaling == sizes.head**-0.5 and sizes.dtype == torch.float32


def test_rotary_tables_turn_pairs() -> None:
    model = packed_model("llama")
    cosines, sines = read_rotary(model, 50)
    assert cosines.shape == sines.shape == (50, 32)
    angles = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(cosines, angles.cos(), atol=1e-5) and torch.allclose(sines, angles.sin(), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ],
)
def test_features_that_the_kernel_lacks_are_refused(changes, message) -> None:
    model = packed_model("llama")
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        read_sizes(model, 100)


def test_other_families_are_refused() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="model_type"):
        read_sizes(model, 100)


def test_a_sliding_window_is_refused() -> None:
    model = packed_model("mistral")
    model.config.sliding_window = 64
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        read_sizes(model, 100)


def test_layers_that_are_not_packed_are_refused() -> None:
    model = packed_model("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = torch.nn.Linear(512, 512)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        read_blocks(model, read_sizes(model, 100))


def test_layers_that_do_not_share_their_inputs_are_refused() -> None:
    model = packed_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight_input_scale[5] *= 2
    with pytest.raises(UnsupportedModelError, match="share their input scales"):
        read_blocks(model, read_sizes(model, 100))


def test_norms_of_another_dtype_are_refused() -> None:
    model = packed_model("qwen3").to(torch.bfloat16)
    sizes = read_sizes(model, 100)
    model.model.layers[1].self_attn.k_norm.float()
    with pytest.raises(UnsupportedModelError, match=r"dtype of the model, got torch.float32 and torch.bfloat16"):
        read_blocks(model, sizes)
    model.model.norm.float()
    with pytest.raises(UnsupportedModelError, match="dtype of the model"):
        read_sizes(model, 100)


def test_a_model_on_several_devices_is_refused() -> None:
    model = packed_model("llama")
    model.model.layers[2].to("meta")
    with pytest.raises(UnsupportedModelError, match="on one GPU, got cpu, meta"):
        read_sizes(model, 100)


def test_positions_that_turn_a_part_of_a_head_are_refused() -> None:
    model = packed_model("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:16]
    with pytest.raises(UnsupportedModelError, match="all 64 numbers of a head, got 32"):
        read_rotary(model, 50)


def test_what_the_engine_refuses_goes_through_transformers(tiny_model_dir: Path) -> None:
    """As on a GPU, on the processor under another name."""
    reasons = []
    model, _ = generate.load(tiny_model_dir, on_fallback=reasons.append, device="cpu:0")
    assert "must be on one" in reasons[0].requirement
    with pytest.raises(UnsupportedModelError, match="must be on one"):
        generate.load(tiny_model_dir, engine="native", device="cpu:0")
    assert isinstance(model, transformers.PreTrainedModel) and model.device.type == "cpu"
    assert len(list(generate.generate_tokens(model, [1, 2, 3], generate.Sampling(4, temperature=0)))) == 4


def test_a_model_does_not_run_on_several_devices(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="one device"):
        load(tmp_path, None, EngineChoice.auto, "cuda:0,cuda:1")


def test_a_full_cache_is_refused() -> None:
    position = Position(3, "cpu")
    position.advance()
    position.move_to(2)
    position.advance()
    with pytest.raises(OptionError, match="cache's 3 places, got token 4; begin another text"):
        position.advance()
    assert position.on_host == 3 and int(position.on_device) == 2, "the device counts by itself"
    position.move_to(0)
    position.advance()
    assert position.on_host == 1 and int(position.on_device) == 0


@pytest.mark.parametrize("place", [-1, 4])
def test_a_place_outside_the_cache_is_refused(place) -> None:
    with pytest.raises(OptionError, match=f"one of the cache's 3, got {place}"):
        Position(3, "cpu").move_to(place)


@pytest.mark.parametrize(("units", "rows", "grid"), [(9, 15, 132), (9, 9, 132), (1, 896, 20), (128, 896, 132), (448, 128, 132), (3, 7, 5)])
def test_shared_memory_has_room_for_the_rows_of_every_block(units, rows, grid) -> None:
    """By going through the units of all blocks."""
    blocks = min(grid, units * rows)
    cuts = [units * rows * block // blocks for block in range(blocks + 1)]
    touched = max((stop - 1) // units - start // units + 1 for start, stop in zip(cuts, cuts[1:]))
    steps = -(-3 * token.ctypes.sizeof(token._Step) // 16) * 16
    sums = (compiled.TOKEN_WARPS + touched - 1) * 64 * 4
    found = token.shared_bytes(units, rows, grid)
    assert 0 <= found - (steps + units * 64 + -(-units // 4) * 16 + sums) <= 256
    assert found % 16 == 0


VARIANTS = {"80": (6, torch.float16, 64, 3, 2), "90": (7, torch.bfloat16, 128, 4), "120": (8, torch.float32, 32, 7, 2)}


@needs_nvrtc
@pytest.mark.parametrize(("architecture", "variant"), VARIANTS.items())
def test_the_kernel_compiles_and_its_structures_are_those_of_python(architecture, variant) -> None:
    layouts = same_layout("Step", token._Step), same_layout("Token", token._Token)
    source = "\n".join([compiled.token_source(*variant), *layouts])
    options = (f"--gpu-architecture=sm_{architecture}", "--std=c++17")
    image = driver.compile_source(source, options)
    assert image[:4] == b"\x7fELF"
    # weights that a warp has fetched ahead go through memory first where registers have no room, which cost 7 % of the speed
    assert stack_bytes(image) == 0
