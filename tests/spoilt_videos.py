"""Defects put into videos, uint8 [T, h, w, 3], each by a function that is called as `instruments` names the defect."""

import cv2
import numpy as np


def fade(video):
    """By 10 % from end to end."""
    return np.rint(video * np.linspace(1, 0.9, len(video))[:, None, None, None]).astype(np.uint8)


def blur(video):
    """Of sigma 1, over the middle of the video and until its end."""
    sigmas = np.clip(np.linspace(-0.5, 1.3, len(video)), 0, 1)
    return np.stack([cv2.GaussianBlur(f, (0, 0), s) if s > 0 else f for f, s in zip(video, sigmas)])


def freeze(video, frames=8):
    """From frame 20 on for `frames`, then on where it would be."""
    return np.concatenate([video[:20], np.repeat(video[19:20], frames, 0), video[20 + frames :]])


def loop(video, frames=30):
    """Back to its beginning every so many frames."""
    return video[np.arange(len(video)) % frames]


def uniform(video):
    """Frame 20 is grey."""
    return np.concatenate([video[:20], np.full_like(video[:1], 90), video[21:]])


def seam(video, blocks):
    """Where a block begins the picture leaps to the side by a pixel."""
    number = np.arange(len(video))
    leaps = np.where(number < blocks.first, 0, 1 + (number - blocks.first) // blocks.frames)
    width = video.shape[2] - leaps[-1]
    return np.stack([frame[:, leap : leap + width] for frame, leap in zip(video, leaps)])
