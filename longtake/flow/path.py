"""The straight path between clean latents and noise, and the conversions along it. Pure math in float32.

x_sigma = (1 - sigma) clean + sigma noise; velocity = noise - clean. `sigma` is [B] or [B, F] beside [B, F, C, H, W].
"""

from __future__ import annotations

from torch import Tensor


def per_frame(sigma: Tensor) -> Tensor:
    """sigma [B] or [B, F] shaped to multiply latents [B, F, C, H, W]; float32."""
    sigma = sigma.float()
    return sigma[:, None, None, None, None] if sigma.ndim == 1 else sigma[:, :, None, None, None]


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents at `sigma`; exactly `clean` where sigma is 0."""
    level = per_frame(sigma)
    return (1 - level) * clean.float() + level * noise.float()


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """The target that the model predicts: noise - clean."""
    return noise.float() - clean.float()


def clean_from_velocity(noisy: Tensor, predicted: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a predicted velocity means."""
    return noisy.float() - per_frame(sigma) * predicted.float()


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance with the usual w: uncond + w (cond - uncond)."""
    return unconditional + guidance * (conditional - unconditional)
