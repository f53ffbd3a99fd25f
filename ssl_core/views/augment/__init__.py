"""Batched, seeded, device-side transforms of views."""
