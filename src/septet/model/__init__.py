"""Which layers of a model are quantized, which of them together, and how packed modules get into the model."""

from septet.model.plan import LayerPlan, plan
from septet.model.replace import Runtime, install, replace_modules, restore_modules, septet_modules, set_activations

__all__ = ["LayerPlan", "Runtime", "install", "plan", "replace_modules", "restore_modules", "septet_modules", "set_activations"]
