"""What is on disk: checkpoints (read) and bundles (written and read). Specification: README.md."""
