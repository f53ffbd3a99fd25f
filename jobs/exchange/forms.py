"""The forms that a model can be exported in: a table that the command line reads without importing networks."""

FORMS: dict[str, tuple[str, str]] = {
    "safetensors": ("plain", "weights under the stock network's names, and a JSON card"),
    "torchscript": ("traced", "a traced network that PyTorch runs without Python code"),
    "onnx": ("onnx_file", "a network for ONNX runtimes; needs the extra `export`"),
    "monai": ("monai_bundle", "a bundle of MONAI with preprocessing and sliding windows; segmenters only"),
    "nnunet": ("nnunet", "a checkpoint that nnU-Net fine-tunes; of resenc and plain_unet"),
}
"""Name of a form: the module that writes it, and what it is."""
