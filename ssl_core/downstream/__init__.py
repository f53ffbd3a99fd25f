"""What an encoder is for: fine-tuning for segmentation, scores of held-out cases, the paired test."""
