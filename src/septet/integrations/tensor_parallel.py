"""Packed layers under transformers' tensor parallelism: which parameters are cut, and whether the cuts fall where they may.

A plan gives one style to a layer, and transformers then cuts all its parameters the same way. Two kinds must stay whole: what belongs
to the inputs of a layer that is cut along its outputs, and the other way round. A matrix that embedding and head share stays whole too.
The format allows cuts between tiles and between rotation blocks only; everything else is refused after loading.
"""

from __future__ import annotations

import re

from torch import nn

from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS
from septet.errors import UnsupportedModelError
from septet.layer import SeptetEmbedding, SeptetLinear, SeptetModule
from septet.model import septet_modules

__all__ = ["adapt_plan", "check_cuts"]

_WHOLE = "replicate"


def adapt_plan(model: nn.Module) -> None:
    """Add rules for the parameters that must stay whole to the plan of a model with packed modules."""
    plan = getattr(model, "_tp_plan", None)
    if not plan:
        return
    embeddings = {id(module.weight) for _, module in septet_modules(model) if isinstance(module, SeptetEmbedding)}
    for name, module in septet_modules(model):
        rule = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if rule not in plan:
            continue
        if id(module.weight) in embeddings:
            del plan[rule]
            continue
        for part in _whole_parts(module, "rowwise" in plan[rule]):
            plan[f"{rule}.{part}"] = _WHOLE
    if _WHOLE in plan.values():
        _register_whole()


def check_cuts(name: str, module: SeptetModule) -> None:
    """Raise unless a module is whole or cut where the format allows it.

    Raises:
        UnsupportedModelError: a cut goes through a tile or a rotation block.
    """
    mesh, placements = getattr(module.weight, "device_mesh", None), getattr(module.weight, "placements", ())
    for placement in placements:
        kind = type(placement).__name__
        if kind == "Replicate":
            continue
        if kind != "Shard" or not isinstance(module, SeptetLinear):
            raise UnsupportedModelError(
                "packed layers can be cut along inputs or outputs only", f"{kind} for {name}", "load it on one rank"
            )
        outputs = placement.dim == 0
        if module.code == "int8":
            unit = 1 if outputs else module.input_block
        else:
            unit = max(TILE_OUTPUTS, module.output_block) if outputs else max(TILE_INPUTS, module.input_block, module.group_size or 1)
        features, ranks = (module.out_features if outputs else module.in_features), mesh.size()
        if features % (ranks * unit):
            axis = "outputs" if outputs else "inputs"
            got = f"{features / ranks:g} in {name} with {ranks} ranks"
            hint = "use another number of ranks, or quantize with a smaller rotation_block"
            raise UnsupportedModelError(f"tensor-parallel slices must be multiples of {unit} {axis}", got, hint)


def _whole_parts(module: SeptetModule, along_inputs: bool) -> list[str]:
    """The parameters of a layer that every rank needs whole."""
    per_output = ["weight_scale", "weight_offset"]
    if not along_inputs:
        # One scale for the whole tensor has one row, which nobody can cut.
        whole = ["weight_input_scale", *(per_output if module.code == "split" and module.weight_scale.shape[0] == 1 else [])]
    else:
        whole = per_output if module.code != "split" or module.group_size is None else []
    return [part for part in whole if getattr(module, part) is not None]


def _register_whole() -> None:
    """transformers before 5.20 has no style for parameters that stay whole; a layer of the base class does just that."""
    from transformers.distributed import tensor_parallel

    if _WHOLE not in tensor_parallel.ALL_PARALLEL_STYLES:
        tensor_parallel.ALL_PARALLEL_STYLES.register(_WHOLE, tensor_parallel.TensorParallelLayer())
