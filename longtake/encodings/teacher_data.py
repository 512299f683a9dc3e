"""`longtake teacher-data`: an encoded set whose clips, or paths from noise to them, a teacher made.

A bidirectional teacher makes whole clips of pictures and prompts, for who has no videos. A causal one starts from noise
in each block of real clips, after the real frames before it: its paths are what ODE regression learns from. Noise is a
function of the seed and the row, so that the set depends neither on ranks nor on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.config.groups import ParallelConfig
from longtake.config.objective import TeacherSampling
from longtake.config.stage import StageConfig
from longtake.data.encoded import EncodedRows
from longtake.data.loader import Batch, collate
from longtake.data.order import Pick
from longtake.data.samples import Dataset, Sample
from longtake.encodings.encode import EncodedRow, RowEncoder, StoredEncoder, make_batch
from longtake.encodings.key import check_encoded, contents_of, sizes_key, teacher_key
from longtake.encodings.write import DTYPES, EncodeReport, Layout, SetWriter, real_rows
from longtake.errors import ConfigError, DataError
from longtake.flow.sampler import euler_states
from longtake.flow.schedule import sampling_sigmas
from longtake.inference.sampling import teacher_velocity
from longtake.models.dit import VideoDiT
from longtake.objectives.batch import EncodedBatch
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.packed import PackedClip
from longtake.train.networks import Builder
from longtake.weights.students import weights_folder

_SAME = 1e-6  # levels nearer than that are one


def teacher_data(
    config: StageConfig,
    output: str | Path,
    mesh: Mesh | None = None,
    *,
    dtype: str = Layout.dtype,
    rows_per_shard: int = Layout.rows_per_shard,
    overwrite: bool = Layout.overwrite,
) -> EncodeReport:
    """Has the teacher of a stage make the data that the stage learns from.

    For `ode_regression` these are the paths that its keys describe. For every other stage they are whole clips by its
    bidirectional weights, sampled as for validation (`validation.teacher_steps`, `teacher_guidance`). Args and Raises:
    as `write.encode`, but that `data.path` may be an encoded set.
    """
    # Each rank makes rows of its own, so that all weights are whole on it.
    whole = ParallelConfig(data_parallel="ddp")
    config, layout = config.model_copy(update={"parallel": whole}), Layout(dtype, rows_per_shard, overwrite)
    with init_mesh() if mesh is None else nullcontext(mesh) as ranks:
        ranks = ranks.arranged(whole)
        with TeacherWriter(config, Path(output), ranks, layout) as writer:
            return writer.make()


class TeacherWriter(SetWriter):
    """Writes sets that the teacher of a stage makes."""

    def make(self) -> EncodeReport:
        """The whole set."""
        config, sampling = self.config, self.sampling
        builder = Builder(config, self.mesh)
        weights = weights_folder(config.source(sampling.source), config.logdir)
        maker = self.maker(builder.frozen_at(weights).eval())
        encoder = TeacherEncoder(self.inner(with_tokens=maker.teacher.config.image_dim is not None), maker)
        size = self.mesh.on_main(lambda: encoder.row_bytes(self.dataset, DTYPES[self.layout.dtype]))
        return self.write(encoder, lambda: self.teacher_head(encoder, builder.identity(weights)), size)

    @property
    def sampling(self) -> TeacherSampling:
        """How the teacher samples. Raises: ConfigError when the stage has none."""
        config = self.config
        if config.objective.paths is not None:
            return config.objective.paths
        name = config.objective.reference
        if name is None:
            raise ConfigError(
                f"stage {config.name} ({config.objective.kind}) names no bidirectional teacher; give a recipe of "
                "teacher_forcing, whose init_from makes whole clips, or of ode_regression"
            )
        network, how = config.networks[name], config.validation
        assert network.source is not None
        return TeacherSampling(
            network.key, network.source, False, how.teacher_steps, how.teacher_guidance, keeps_path=False
        )

    def maker(self, teacher: VideoDiT) -> PathMaker:
        """What makes clips and paths with these weights."""
        config = self.config
        with_picture = config.model.image_condition == "i2v"
        return PathMaker(
            teacher,
            self.sampling,
            config.stream_plan.with_given(int(with_picture)),
            config.flow.shift,
            config.seed,
            config.clip_shape.num_latent_frames,
            first_frame_clean=with_picture and config.model.first_frame_sigma == "zero",
            bf16=config.precision == "bf16",
        )

    def inner(self, *, with_tokens: bool) -> RowEncoder:
        """What gives the rows that the teacher needs. Raises: CheckpointError, ConfigError, DataError."""
        config, dataset, with_latents = self.config, self.dataset, self.sampling.causal
        if not isinstance(dataset, EncodedRows):
            return self.encoder(with_latents=with_latents)
        contents = contents_of(config.model, with_tokens=with_tokens, with_latents=with_latents)
        check_encoded(config, dataset, self.mesh, contents)
        return StoredEncoder(dataset, config.clip_shape, contents, device=self.mesh.device)

    def teacher_head(self, encoder: TeacherEncoder, identity: str) -> dict[str, Any]:
        """`key` and `files` of the set; `identity` of the teacher's weights."""
        config, dataset = self.config, self.dataset
        if isinstance(encoder.inner, StoredEncoder):
            assert isinstance(dataset, EncodedRows)
            head: dict[str, Any] = {"key": dict(dataset.key), "files": dataset.files}
        else:
            head = self.head(encoder.inner)
        how = teacher_key(self.sampling, config.stream_plan, config.flow.shift)
        head["key"] |= sizes_key(config.model, config.data, config.clip_shape, encoder.contents)
        head["key"] |= {"contents": encoder.contents, "teacher": {"weights": identity, "seed": config.seed, **how}}
        return head


def path_sigmas(num_steps: int, shift: float, levels: Sequence[float]) -> list[float]:
    """Falling noise levels of a path: those of a sampler of so many steps from 1 to 0, and `levels` among them."""
    grid = [sigma for sigma in sampling_sigmas(num_steps, shift) if all(abs(sigma - level) > _SAME for level in levels)]
    return sorted([*grid, *levels], reverse=True)


@dataclass(frozen=True)
class PathMaker:
    """Makes clips and paths of a micro-batch.

    Fields: `plan` with the frames that are given; `num_frames` latents; `first_frame_clean`, whether a bidirectional
    teacher sees the picture as a clean frame 0; `bf16`, whether matrix products are rounded so.
    """

    teacher: VideoDiT
    sampling: TeacherSampling
    plan: StreamPlan
    shift: float
    seed: int
    num_frames: int
    first_frame_clean: bool
    bf16: bool = False

    @property
    def levels(self) -> list[float]:
        """The levels whose states are kept."""
        return self.plan.all_levels if self.sampling.keeps_path else []

    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Of what is made of a row whose latents have that height and width."""
        clip = (self.num_frames, self.teacher.config.out_channels, *size)
        made = {} if self.sampling.causal else {"latents": clip}
        return made | ({"path": (len(self.levels) + 1, *clip)} if self.sampling.keeps_path else {})

    @torch.no_grad()
    def __call__(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """`path` [B, K + 1, F, C, H, W] and, of a bidirectional teacher, `latents` [B, F, C, H, W]: its end.

        The given picture is frame 0 of each. `indices` of the batch are row numbers.
        """
        given, size = self.plan.given_frames, size_of(batch)
        shape = (self.num_frames, self.teacher.config.out_channels, *size)
        noise = KeyedRNG(self.seed).noise(0, "teacher", batch.indices, shape, batch.condition.text.device)
        sigmas = path_sigmas(self.sampling.num_steps, self.shift, self.levels)
        kept = []
        with torch.autocast(noise.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            for sigma, state in zip(sigmas, euler_states(self._velocity(batch), noise, sigmas)):
                if sigma in self.levels or sigma == 0:
                    kept.append(state)
        path = torch.stack(kept, 1)
        if given:
            assert batch.first_latent is not None
            path[:, :, :given] = batch.first_latent[:, None].float()
        made = {} if self.sampling.causal else {"latents": path[:, -1]}
        return made | ({"path": path} if self.sampling.keeps_path else {})

    def _velocity(self, batch: EncodedBatch) -> Callable[[Tensor, Tensor], Tensor]:
        condition, guidance = batch.condition, self.sampling.guidance
        if not self.sampling.causal:
            first = batch.first_latent if self.first_frame_clean else None
            return teacher_velocity(self.teacher, condition, batch.empty_text, guidance, first)
        assert batch.latents is not None
        clean, given, packed = batch.latents.float(), self.plan.given_frames, PackedClip(self.plan)
        context = packed.context(clean, KeyedRNG(self.seed), 0, batch.indices)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            levels = sigma[:, None].repeat(1, x.shape[1])
            x, levels[:, :given] = torch.cat([clean[:, :given], x[:, given:]], 1), 0.0
            return packed.guided(self.teacher, condition, batch.unconditional, guidance, context, x, levels)

        return velocity


class TeacherEncoder:
    """Rows of another encoder, with what a teacher makes of them."""

    def __init__(self, inner: RowEncoder, maker: PathMaker) -> None:
        self.inner, self.maker = inner, maker
        self.contents, self.empty_text = [*inner.contents, *maker.shapes((1, 1))], inner.empty_text
        self.later_texts = inner.later_texts

    def check(self, sample: Sample) -> None:
        """Raises DataError for a sample that the teacher cannot use."""
        self.inner.check(sample)
        made = self.inner.shape.num_pixel_frames
        if not self.maker.sampling.causal and any(frame < made for frame in sample.switch_frames):
            where = sample.where or sample.name
            raise DataError(f"{where}: its caption changes on the way, and a bidirectional teacher reads one a clip")

    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample of a batch."""
        rows = self.inner.rows(batch)
        made = self.maker(make_batch(self.inner, rows, batch.rows))
        return [row | {name: part[k].clone() for name, part in made.items()} for k, row in enumerate(rows)]

    def row_bytes(self, dataset: Dataset, dtype: torch.dtype) -> int:
        """Bytes of the first row that can be used, as it will be stored; 0 where none can."""
        inner = self.inner
        for row in range(len(dataset)):
            try:
                sample: Sample = dataset[row]
                self.check(sample)
            except DataError:
                continue
            encoded = inner.rows(collate([sample], [Pick(row, row)], [row]))[0]
            size = size_of(make_batch(inner, [encoded], [row]))
            numbers = [part.numel() for name, part in encoded.items() if name in inner.contents]
            numbers += [torch.Size(shape).numel() for shape in self.maker.shapes(size).values()]
            return 2 * len(sample.prompts) * real_rows(encoded["text"]).numel() + dtype.itemsize * sum(numbers)
        return 0


def size_of(batch: EncodedBatch) -> tuple[int, int]:
    """Height and width of the latents that a batch asks for."""
    like = batch.first_latent if batch.latents is None else batch.latents
    return batch.latent_size if like is None else (like.shape[-2], like.shape[-1])
