"""The ranking of `sensitivity` as rows of text, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

Layer = Mapping[str, Any]

_PLOT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {{ 18 * layers|length + 40 }}"
 font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/>
<text x="8" y="18" font-size="13">{{ title }}</text>
{% for layer in layers %}<text x="290" y="{{ 18 * loop.index + 25 }}" text-anchor="end">{{ layer.name }}</text>
<rect x="296" y="{{ 18 * loop.index + 15 }}" width="{{ "%.1f"|format(layer.width) }}" height="12" fill="#3b6fb6"/>
<text x="{{ "%.1f"|format(300 + layer.width) }}" y="{{ 18 * loop.index + 25 }}">{{ layer.value }}</text>
{% endfor %}</svg>
"""


def to_plain(layer: Any) -> dict[str, Any]:
    """A `LayerDamage` as an object for JSON, with six significant digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in asdict(layer).items()}


def rows(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """A row for each layer: its name, and its damage in words."""
    return [(str(layer["name"]), ", ".join(_parts(layer))) for layer in layers]


def _parts(layer: Layer) -> list[str]:
    kl = [] if layer["kl"] is None else [f"KL {layer['kl']:.2e}"]
    return [*kl, f"output error {layer['output_error']:.2e}", f"{layer['weights'] / 1e6:.2f} M weights"]


def write_json(layers: Sequence[Layer], path: Path) -> None:
    """Write the layers in their order."""
    path.write_text(json.dumps({"layers": list(layers)}, indent=1) + "\n", encoding="utf-8")


def write_plot(layers: Sequence[Layer], path: Path, most: int = 60) -> None:
    """Draw the damage of the first `most` layers as bars, in an SVG file."""
    import jinja2

    measure = "kl" if layers and layers[0]["kl"] is not None else "output_error"
    greatest = max((layer[measure] for layer in layers), default=0) or 1
    bars = [
        {"name": layer["name"], "width": 340 * layer[measure] / greatest, "value": f"{layer[measure]:.2e}"}
        for layer in layers[:most]
    ]
    title = (
        "KL divergence of the predictions, layer alone in INT8" if measure == "kl" else "relative error of the layer's outputs"
    )
    title += f", {most} of {len(layers)} layers" if len(layers) > most else ""
    svg = jinja2.Environment(autoescape=True).from_string(_PLOT).render(layers=bars, title=title)
    path.write_text(svg, encoding="utf-8")


WRITERS: Mapping[str, Callable[[Sequence[Layer], Path], None]] = {".json": write_json, ".svg": write_plot}
