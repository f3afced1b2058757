"""From a checkpoint to a package: graphs per variant, texts, the manifest."""
