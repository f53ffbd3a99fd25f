"""What lies in a store: layout, codecs, metadata, volume records and the manifest."""
