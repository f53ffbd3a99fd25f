"""Losses as pure functions of tensors. Each says where its formula is from; slow references are in tests/oracles."""
