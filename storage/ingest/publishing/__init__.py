"""How ingested volumes become a manifest: claims on names, refusals on record, splits, one atomic step."""
