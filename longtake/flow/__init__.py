"""The mathematics of flow matching: path, noise levels, sampler."""
