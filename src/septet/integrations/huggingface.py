"""septet as a quantization method of transformers.

    AutoModelForCausalLM.from_pretrained(directory)                                     a checkpoint that septet made
    AutoModelForCausalLM.from_pretrained(directory, quantization_config=SeptetConfig())  a dense one, quantized when it is loaded

`save_pretrained`, `generate` and `dequantize` work as ever. Importing septet registers this module (see `_import_hook`).
Checkpoints are checked before they are loaded, and the model after it was; nothing in a checkpoint is executed.
"""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import MethodType

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from septet import model as models
from septet.checkpoint.description import checksums_of, layers_of, quantization_of
from septet.checkpoint.options import FORMAT_VERSION, QuantizeOptions, allocation_of
from septet.errors import CheckpointError, OptionError, UnsupportedModelError
from septet.integrations import loaded_model, saved_model, tensor_parallel
from septet.integrations.on_the_fly import quantize_model
from septet.integrations.stored_files import check_files

__all__ = ["SeptetConfig", "SeptetHfQuantizer"]

#: What only `septet quantize` can do.
_NOT_HERE = {"max_shard_bytes", "effort", "calibration", "calibration_tokens", "allocation"}
_OPTIONS = tuple(field.name for field in fields(QuantizeOptions) if field.name not in _NOT_HERE)


@register_quantization_config("septet")
class SeptetConfig(QuantizationConfigMixin):
    """How to quantize, or how a checkpoint was quantized.

    Args:
        modules_to_not_convert: modules to leave as they are: dotted names, or parts of them such as "down_proj" or "layers.0".
        layers: module name -> description; filled in by quantizing.
        crc32: tensor key -> checksum; filled in by saving.
        format_version: of the checkpoint.
        options: `code`, `bits_per_weight`, `head`, `activations`, `activation_scale`, `rotation_block`, `seed`, `symmetric`,
            `granularity`, `group_size`, `range_method`: see `septet.checkpoint.QuantizeOptions` for values and defaults.

    Raises:
        OptionError: an option is unknown, or has an unknown value.
        SpecVersionError: this septet cannot read the format.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        layers: dict[str, dict] | None = None,
        crc32: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **options,
    ) -> None:
        options.pop("quant_method", None)
        self.quant_method = "septet"
        quantization_of({"quantization_config": {"quant_method": "septet", "format_version": format_version}}, "the checkpoint")
        self.format_version = format_version
        for name in options:
            if name not in _OPTIONS:
                raise OptionError(f"an option must be one of {', '.join(_OPTIONS)}", name, "correct the option")
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.layers = layers or {}
        self.crc32 = crc32 or {}
        chosen = self._checked(options)
        for name in _OPTIONS:
            setattr(self, name, getattr(chosen, name))

    @property
    def options(self) -> QuantizeOptions:
        """The options, checked."""
        return self._checked({name: getattr(self, name) for name in _OPTIONS})

    def _checked(self, options: dict[str, object]) -> QuantizeOptions:
        """A finished checkpoint may have widths by layer; while a model is loaded, all layers get the same."""
        bits = options.get("bits_per_weight", QuantizeOptions.bits_per_weight)
        return QuantizeOptions(**options, allocation=allocation_of(bits) if self.layers else "uniform")

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """From the JSON of a checkpoint, which nobody vouches for; keys that this version does not know are ignored.

        Raises:
            CheckpointError: a value cannot be.
            SpecVersionError: this septet cannot read the format.
        """
        quantization_of({"quantization_config": {"format_version": FORMAT_VERSION} | config_dict}, "the checkpoint")
        for key, check in (("layers", layers_of), ("crc32", checksums_of)):
            if key in config_dict:
                check(config_dict)
        known = {*_OPTIONS, "modules_to_not_convert", "layers", "crc32"}
        try:
            config = cls(**{key: value for key, value in config_dict.items() if key in known})
        except OptionError as error:
            raise CheckpointError(error.requirement, f"{error.got} in config.json", "fetch config.json again") from error
        except TypeError as error:
            raise CheckpointError("options in config.json must have the right types", error, "fetch config.json again") from error
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, object]:
        """The JSON of a checkpoint; options that only quantizing needs are in the descriptions of the layers."""
        kept = {"modules_to_not_convert": list(self.modules_to_not_convert)} if self.modules_to_not_convert else {}
        return self.options.config_entry() | kept | {"layers": dict(self.layers), "crc32": dict(self.crc32)}

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}={getattr(self, name)!r}" for name in _OPTIONS)
        return f"SeptetConfig({chosen}, {len(self.layers)} layers)"


@register_quantizer("septet")
class SeptetHfQuantizer(HfQuantizer):
    """Called by `from_pretrained` and `save_pretrained`."""

    requires_calibration = False

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        """Refuse what on-the-fly quantization cannot do, before anything is loaded.

        Raises:
            UnsupportedModelError: a dense model is to be spread over devices or disk.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            hint = "quantize with `septet quantize` first, then load the result with any device_map"
            raise UnsupportedModelError("a model that is quantized while it is loaded must be on one device", device_map, hint)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """The model is on the meta device: put packed modules in, or make the plan."""
        config = self.quantization_config
        if not self.pre_quantized:
            self._layers = models.plan(model, config.options, config.modules_to_not_convert)
            return model
        quantization = {"layers": config.layers, "crc32": config.crc32}
        if checkpoint_files and _is_first_rank():
            check_files(checkpoint_files, quantization)
        loaded_model.prepare(model, layers_of(quantization), self._runtime(model))
        tensor_parallel.adapt_plan(model)
        self._shapes = loaded_model.shapes_of(model)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        """The weights are there: quantize, or check."""
        config = self.quantization_config
        # transformers has no hook behind `save_pretrained`, and hashes can be taken from finished files only.
        model.save_pretrained = MethodType(save_pretrained, model)
        if self.pre_quantized:
            loaded_model.finish(model, self._shapes, self._runtime(model))
            return model

        def bar(groups: list) -> object:
            return logging.tqdm(groups, desc="Quantizing")

        config.layers = quantize_model(model, self._layers, config.options, self._runtime(model), bar)
        loaded_model.tie(model, config.layers)
        for layer in self._layers:
            if layer.source is not None:
                loaded_model.untie(model, layer.name)
        del self._layers
        return model

    def _runtime(self, model) -> models.Runtime:
        config = self.quantization_config
        return models.Runtime(config.activations, config.activation_scale, _as_dtype(getattr(model.config, "dtype", None)))

    def get_state_dict_and_metadata(self, model):
        """What `save_pretrained` writes, after noting its checksums in the config."""
        state_dict = saved_model.state_dict_of(model)
        self.quantization_config.crc32 = saved_model.checksums(model, state_dict)
        model.config.quantization_config = self.quantization_config
        return state_dict, {}

    def _dequantize(self, model, dtype=None):
        """`model.dequantize()`: dense modules with the values of the packed ones."""
        models.restore_modules(model, _as_dtype(dtype))
        loaded_model.forget_companions(model)
        model.__dict__.pop("save_pretrained", None)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No gradient flows through packed layers."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operators are opaque to torch.compile."""
        return True


def save_pretrained(model, save_directory, *args, **keywords):
    """`save_pretrained` of a packed model: that of its class, and septet.json, which `septet verify` needs.

    What is pushed to a hub is sent before that of its class returns, so septet.json is written just before.
    """
    original = type(model).save_pretrained
    given = signature(original).bind(model, save_directory, *args, **keywords)
    given.apply_defaults()
    chosen = {**given.arguments, **keywords}
    whole = not any(chosen.get(name) for name in ("variant", "distributed_checkpoint")) and not getattr(model, "peft_config", None)
    writes = whole and chosen.get("is_main_process", True) and _is_first_rank()

    def upload(directory, *rest, **named):
        if writes:
            saved_model.write_hashes(Path(directory))
        return type(model)._upload_modified_files(model, directory, *rest, **named)

    model._upload_modified_files = upload
    try:
        result = original(model, save_directory, *args, **keywords)
    finally:
        del model._upload_modified_files
    if writes and Path(save_directory).is_dir():
        saved_model.write_hashes(Path(save_directory))
    return result


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype as a model's config has it: `save_pretrained` turns it into its name."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.get_default_dtype() if dtype is None else dtype


def _is_first_rank() -> bool:
    """Whether this process is the one that checks the files for all of a distributed run."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
