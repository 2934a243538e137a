"""Run a checkpoint: load it, show it images, generate."""
