"""ONNX: the network for windows of the bundle's size and batches of any."""

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

from jobs.exchange.model import Model
from storage.errors import ConfigError

FILE = "model.onnx"
OPSET = 17
"""Old enough for the runtimes of clinical viewers; our choice."""


def write(model: Model, folder: Path) -> list[str]:
    """`model.onnx`, `card.json` and `MODEL_CARD.md`.

    Raises:
        ConfigError: the package `onnx` is not installed, or the network has layers that ONNX lacks.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError(
            "--to onnx",
            expected="the packages onnx and onnxruntime",
            found="no onnx",
            remedy="pip install 'tomoscale[export]', or export with `--to torchscript`",
        )
    with warnings.catch_warnings():
        # The exporter by tracing is the one that needs no further packages; it says that there is another. Of instance
        # norms without running statistics it says that they are exported as they are.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "ONNX export mode is set to TrainingMode.EVAL", UserWarning)
        try:
            torch.onnx.export(
                model.outputs,
                (model.window(),),
                folder / FILE,
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(model.names),
                dynamic_axes={name: {0: "batch"} for name in ("image", *model.names)},
            )
        except torch.onnx.OnnxExporterError as error:
            raise ConfigError(
                f"{model.predictor.card['name']} as ONNX",
                expected=f"layers that opset {OPSET} has",
                found=str(error).strip().splitlines()[0],
                remedy="export with `--to torchscript`",
            ) from error
    model.write_card(folder, "onnx", file=FILE, opset=OPSET)
    d, h, w = model.predictor.plan.patch_DHW
    notes = [f"{FILE}: (B, {model.predictor.plan.channels}, {d}, {h}, {w}) float32 to {', '.join(model.names)}"]
    if importlib.util.find_spec("onnxruntime") is None:
        return [*notes, "not compared with the bundle: onnxruntime is not installed (pip install 'tomoscale[export]')"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])

    def run(x_BCDHW: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"image": x_BCDHW.numpy()})]

    model.check("onnx", run, batch=2)
    return notes
