"""Hypernetworks of A1111 as safetensors: `WIDTH.SIDE.linear.NUMBER.weight` and `.bias`, SIDE k or v.

A1111's own file is a pickle of {width: (networks of keys, of values)}, which is never opened here. docs/imports.md has
the lines that turn it into this form and back. The header has A1111's settings: `activation_func`, `is_layer_norm`,
`activate_output`, and `layer_structure` as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperdb.adapters.a1111 import ACTIVATIONS, A1111Config, side_of, sizes_of
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.formats.native import Part
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import load_shapes, load_tensors, save_tensors
from hyperdb.runtime.precision import narrowed

_TENSOR = re.compile(r"([1-9]\d{0,5})\.([kv])\.linear\.?(\d{1,3})\.(weight|bias)")


def is_hypernetwork(path: Path) -> bool:
    """Whether a file is one of these by the names of its tensors; False too for what cannot be read."""
    try:
        shapes = load_shapes(path)
    except UserError:
        return False
    return bool(shapes) and all(_TENSOR.fullmatch(name) for name in shapes)


def _activation(path: Path, told: Mapping[str, str]) -> str:
    """Return the activation between the layers. Raises `UserError` for what this adapter does not have."""
    activation = told.get("activation_func", "linear").lower()
    activation = "linear" if activation == "none" else activation
    if activation not in ACTIVATIONS:
        raise UserError(f"{path} has the activation {activation[:40]!r}: expected one of {', '.join(ACTIVATIONS)}")
    if told.get("is_layer_norm", "False") == "True":
        raise UserError(f"{path} is a hypernetwork with layer normalisation, which is not read")
    if activation != "linear" and (last := told.get("activate_output")) != "False":
        if last == "True":
            raise UserError(f"{path} is a hypernetwork with an activation after its last layer, which is not read")
        raise UserError(
            f"{path} does not say activate_output, without which A1111 has an activation after its last layer and "
            "ComfyUI has none: state it in the file's header, True or False"
        )
    return activation


def _structure(path: Path, layers: Mapping[str, list[dict[str, Tensor]]]) -> list[float]:
    """Return the multiples of the width that all networks are built of.

    A layer has the whole part of multiple times width, so that one of a single width does not tell the multiple.
    """
    found = []
    for network, steps in layers.items():
        width, shapes = int(network.partition(".")[0]), [step["weight"].shape for step in steps]
        if any(len(shape) != 2 for shape in shapes):
            raise UserError(f"{path} has a layer in {network} that is no matrix: layer normalisation is not read")
        found.append([shapes[0][1] / width, *(shape[0] / width for shape in shapes)])
    least = [max(multiples) for multiples in zip(*found, strict=False)]
    for (network, steps), one in zip(layers.items(), found, strict=True):
        sizes = sizes_of(int(network.partition(".")[0]), least)
        if len(one) != len(least) or sizes[1:] != [len(step["weight"]) for step in steps] or one[0] != least[0]:
            raise UserError(f"{path} has networks of several structures: {found[0]} and others")
    return least


def read(path: Path, sites: Mapping[str, nn.Module], base: str) -> Part:
    """Read a hypernetwork for the keys and values `sites` of a model, which is called `base` in messages.

    Raises `UserError`, naming the file, for one that does not fit them or is not known to the number.
    """
    tensors, told = load_tensors(path)
    activation = _activation(path, told)
    networks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UserError(f"{path} has {name[:80]!r}, which is not of a hypernetwork")
        width, side, number, part = match.groups()
        networks.setdefault(f"{width}.{side}", {}).setdefault(int(number), {})[part] = value.float()
    layers = {network: [steps[i] for i in sorted(steps)] for network, steps in networks.items()}
    if any("weight" not in step for steps in layers.values() for step in steps):
        raise UserError(f"{path} has a bias without its weight")
    if "activation_func" not in told and any(0 < len(steps) <= max(steps) for steps in networks.values()):
        raise UserError(
            f"{path} counts activations among its layers and does not say which: state activation_func in its header"
        )
    bias = any("bias" in step for steps in layers.values() for step in steps)
    structure = _structure(path, layers)
    try:
        config = A1111Config(structure, activation, bias)
    except UserError as error:
        raise UserError(f"{path} is no hypernetwork: {error}") from error
    known = {name: Site(name, module) for name, module in sites.items()}
    fed = {name: site for name, site in known.items() if f"{site.shape[1]}.{side_of(name)}" in layers}
    widths = {site.shape[1] for site in known.values()}
    if odd := sorted({int(network.partition(".")[0]) for network in layers} - widths):
        raise UserError(
            f"{path} is for contexts {odd[0]} wide, of which {base} has none but {sorted(widths)}; set diffusion.path "
            "to the base that it was made for"
        )
    params = {}
    for network, steps in layers.items():
        for i, step in enumerate(steps):
            params[f"{network}.{i}.weight"] = step["weight"][None]
            if bias:
                params[f"{network}.{i}.bias"] = step.get("bias", step["weight"].new_zeros(len(step["weight"])))[None]
    try:
        return Part(config, Layout.listing(fed), params)
    except UserError as error:
        raise UserError(f"{path} is no hypernetwork that fits {base}: {error}") from error


def write(path: Path, part: Part, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> Path:
    """Write a part of kind a1111.

    Raises `UserError` for numbers beyond `dtype`, and for layers that A1111 would leave alone.
    """
    config = part.config
    assert isinstance(config, A1111Config)
    if odd := [name for name in part.layout.names if not name.endswith(("to_k", "to_v"))]:
        raise UserError(
            f"the hypernetwork feeds {odd[0]} too, and those of A1111 feed keys and values alone: train one with "
            "adapter.sites=kv"
        )
    apart = 1 if config.activation == "linear" else 2  # A1111 counts the activations between the layers
    tensors: dict[str, Tensor] = {}
    for name, value in part.params.items():
        network, number, what = name.rsplit(".", 2)
        key = f"{network}.linear.{int(number) * apart}"
        tensors[f"{key}.{what}"] = narrowed("the hypernetwork", value[0], dtype)
        if not config.bias:  # which A1111 needs
            tensors[f"{key}.bias"] = value.new_zeros(len(value[0])).to(dtype)
    told = {"activation_func": config.activation, "layer_structure": json.dumps(config.structure)}
    told |= {"is_layer_norm": "False", "activate_output": "False", "format": "pt"}
    return save_tensors(path, tensors, {**metadata, **told}, check=False)
