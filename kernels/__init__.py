"""Running a model: the float32 reference and the backends that run a bundle."""
