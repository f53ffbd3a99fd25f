"""From a folder of scans to a published store. Never enters `storage.stream`."""
