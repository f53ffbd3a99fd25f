"""From an order of samples to batches of crops, read ahead by threads. Never enters `storage.ingest`."""
