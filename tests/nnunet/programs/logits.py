"""Logits of a trained model of nnU-Net for one input: `python logits.py MODEL_FOLDER INPUT.npy OUTPUT.npy`."""

import sys

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from program import declare_operators

declare_operators()
model, source, target = sys.argv[1:]
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0,), "checkpoint_final.pth")
predictor.network.load_state_dict(predictor.list_of_parameters[0])
with torch.no_grad():
    np.save(target, predictor.network.eval()(torch.from_numpy(np.load(source))).numpy())
