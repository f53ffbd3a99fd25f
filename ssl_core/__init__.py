"""Learning: views, augmentation, backbones, methods, the engine, fine-tuning, evaluation and the model bundle.

Knows nothing of Ray, MLflow or S3: it is handed streams and callables.
"""
