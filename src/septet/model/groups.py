"""Fused groups, found by name: layers that read the same input and are one product in most runtimes, so they share s_in.

A group is keyed by the path of its parent and the name of its family:
    model.layers.0.self_attn.q_proj  ->  model.layers.0.self_attn/qkv       (with k_proj and v_proj)
    model.layers.0.mlp.experts.5.w3  ->  model.layers.0.mlp.experts/gate_up (with all w1 and w3 of all experts of the layer)
    model.layers.0.mlp.down_proj     ->  its own name
"""

from __future__ import annotations

import re

__all__ = ["FAMILIES", "group_key"]

#: Last names of the layers that are one product, by family.
FAMILIES = {
    "qkv": (
        {"q_proj", "k_proj", "v_proj"},
        {"query", "key", "value"},
        {"q_lin", "k_lin", "v_lin"},
        {"q", "k", "v"},
        {"wq", "wk", "wv"},
        {"linear_q", "linear_k", "linear_v"},
    ),
    "gate_up": ({"gate_proj", "up_proj"}, {"w1", "w3"}, {"wi_0", "wi_1"}, {"gate", "up"}),
}
_EXPERT = re.compile(r"^(?P<experts>(?:.*\.)?experts)\.\d+(?:\.(?P<inside>.*))?\.(?P<last>[^.]+)$")


def group_key(name: str) -> str:
    """The key of the group that a layer belongs to; layers of equal keys are quantized together.

    Args:
        name: dotted module name.
    """
    expert = _EXPERT.match(name)
    if expert:
        inside = f"/{expert['inside']}" if expert["inside"] else ""
        return f"{expert['experts']}{inside}/{_family(expert['last']) or expert['last']}"
    parent, _, last = name.rpartition(".")
    family = _family(last)
    return f"{parent}/{family}" if family else name


def _family(last: str) -> str | None:
    """The family of a layer's last name, or None."""
    return next((family for family, sets in FAMILIES.items() if any(last in members for members in sets)), None)
