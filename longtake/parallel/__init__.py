"""How a training is spread over ranks."""
