"""safetensors: the weights as they lie in the bundle, and a card that says how to build the network for them."""

from pathlib import Path

from jobs.exchange.model import Model
from ssl_core.portable.network import build, load
from ssl_core.portable.safetensors import read_safetensors

FILE = "model.safetensors"


def write(model: Model, folder: Path) -> list[str]:
    """`model.safetensors`, `card.json` and `MODEL_CARD.md`."""
    (folder / FILE).write_bytes((model.root / "weights.safetensors").read_bytes())
    model.write_card(folder, "safetensors", file=FILE)
    network = build(FILE, model.predictor.architecture)
    keys = model.predictor.architecture["encoder_keys"] if model.predictor.kind == "encoder" else None
    load(FILE, network, read_safetensors(folder / FILE), keys)
    again = type(model.outputs)(network, model.outputs.dims, model.outputs.modules_).eval()
    model.check("safetensors", again)
    return [f"{FILE}: tensors under the names of {model.predictor.architecture['class']}"]
