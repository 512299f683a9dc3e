"""A session from what one wrote down: the other half of `Session.save`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longtake.condition import Condition
from longtake.inference.pipeline import Pipeline
from longtake.inference.session import Session
from longtake.inference.session_state import SessionInputs, SessionState
from longtake.rollout.denoise import DenoisedBlock
from longtake.rollout.recache import LatentHistory


def restored(generator: Pipeline, values: dict[str, Any], tensors: dict[str, Tensor], **past: Any) -> Session:
    """A session from what `save` wrote down (`session_file.read_session`)."""
    pictures = [tensors[f"picture.{index}"] for index in range(sum(name.startswith("picture.") for name in tensors))]

    def inputs(name: str) -> SessionInputs:
        shown = (values[name][which] for which in ("picture", "target"))
        return SessionInputs(values[name]["prompt"], *(None if k is None else pictures[k] for k in shown))

    session = Session(
        generator,
        inputs("inputs"),
        seed=values["seed"],
        guidance=values.get("guidance", generator.settings.guidance),  # files of earlier versions have none
        negative=values["negative"],
        **past,
        max_latent_frames=values["max_latent_frames"],
    )
    if values["decoder"] is not None:
        session.state = _state_of(session, values, tensors)
    session.wanted, session.cut = inputs("wanted"), values["cut"]
    return session


def _state_of(session: Session, values: dict[str, Any], tensors: dict[str, Tensor]) -> SessionState:
    text = tensors["condition.text"]
    condition = Condition(text, tensors.get("condition.image"), tensors.get("condition.frames"))
    unconditional = condition.with_text(tensors["unconditional.text"]) if "unconditional.text" in tensors else None
    blocks = sorted((int(start), latents) for start, latents in _part(tensors, "kept.").items())
    caches = session.new_caches()
    for index, (cache, saved) in enumerate(zip(caches, values["caches"], strict=True)):
        keys, kept = tensors[f"cache.{index}.keys"], tensors[f"cache.{index}.values"]
        cache.restore(saved["position"], saved["frames"], keys, kept)
    plan = session.generator.beginning.plan_of(given=session.state.inputs.picture is not None)
    stream = session.new_stream(values["scene"], caches, condition, unconditional, None, plan)
    stream.kept = LatentHistory(stream.plan)
    for start, latents in blocks:
        stream.kept.position = start
        stream.kept.append(latents)
    if values["pending"]:
        start, clean = blocks[-1]
        context, level = tensors.get("pending.context", clean), stream.plan.context_level(start)
        stream.pending = DenoisedBlock(clean, context, level, context, level)
    decoder = session.generator.new_decoder()
    decoder.restore(_part(tensors, "decoder."), values["decoder"])
    return SessionState(session.wanted, stream, decoder, None, values["scene"], values["num_frames"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
