"""From a checkpoint to a bundle, one decoder layer at a time."""
