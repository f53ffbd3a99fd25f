"""MLflow: runs, registered models, and the bundles that go between them."""
