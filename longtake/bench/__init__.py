"""`longtake bench`: what a stream or a training takes on this machine, part by part, and what its kernels allow."""
