"""The text encoder: prompts to umT5 hidden states with exact zeros past each prompt.

Must know no image and no transformer; the length of the text is the encoder's.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.encoders.offload import FrozenEncoder, offload
from longtake.encoders.original import load_text_model
from longtake.encoders.strict import check_folder, load_strictly, quiet, reading
from longtake.errors import CheckpointError, ConfigError, DataError, printable
from longtake.models.attention import ONE_THREAD
from longtake.weights.locate import tokenizer_places

WAN_TEXT_LEN = 512  # every published Wan model; spec A.1
_MOST_REMEMBERED = 1000  # words that were said to be unknown
_MOST_NAMED = 20  # prompts that were cut; a data set may have thousands
_LONGEST_STATED_LEN = 100_000  # transformers writes 1e30 into tokenizer_config.json where no length is known

log = logging.getLogger(__name__)


def clean_prompt(prompt: str) -> str:
    """The prompt with mended unicode, HTML entities resolved, white space collapsed and stripped (spec C.1)."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def _load_tokenizer(*places: Path) -> tuple[Any, Path]:
    """The tokenizer in the first of `places` that holds one, and that place. Raises: CheckpointError."""
    from transformers import AutoTokenizer

    place = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if place is None:
        looked, files = " or ".join(map(str, places)), "those of google/umt5-xxl, which each Wan repository holds"
        raise CheckpointError(f"no tokenizer_config.json in {looked}; put the tokenizer's files there ({files})")
    with quiet("transformers"), reading(f"the tokenizer in {place} cannot be loaded"):
        return AutoTokenizer.from_pretrained(place, local_files_only=True), place


class TextEncoder(FrozenEncoder):
    """A frozen `UMT5EncoderModel` and its tokenizer.

    Args: `text_len` M, the number of rows of every output, `</s>` included; longer prompts are cut, as Wan does.
    """

    def __init__(self, model: Any, tokenizer: Any, text_len: int) -> None:
        if text_len < 1:
            raise ConfigError(f"text_len={text_len} must be at least 1")
        super().__init__(model)
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.width: int = self.model.config.d_model
        self._cut: set[str] = set()
        self._unknown: set[str] = set()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        text_len: int | None = None,
    ) -> TextEncoder:
        """The encoder of a library folder, or of the original `models_t5_umt5-xxl-enc-bf16.pth`.

        The tokenizer lies in the same folder or beside it in `tokenizer/`; beside the original file in
        `google/umt5-xxl/` or `tokenizer/`.
        Without `text_len` the length stated in `tokenizer_config.json` counts, and 512 where none is stated.
        Raises: CheckpointError.
        """
        path = Path(folder)
        original = path.suffix == ".pth"
        if not original:
            check_folder(path, "text encoder")
        tokenizer, place = _load_tokenizer(*tokenizer_places(path))
        if original:
            model = load_text_model(path, device, dtype)
        else:
            from transformers import UMT5EncoderModel

            # Reshaped weights are not ignored: load_strictly refuses them by name, the library would not name them.
            model = load_strictly(UMT5EncoderModel, path, dtype=dtype, ignore_mismatched_sizes=True)
        if len(tokenizer) > model.config.vocab_size:
            both = f"{len(tokenizer)} tokens and the text encoder in {path} only {model.config.vocab_size}"
            raise CheckpointError(f"the tokenizer in {place} has {both}; take both from the same release")
        if text_len is None:
            stated = tokenizer.model_max_length
            text_len = stated if stated < _LONGEST_STATED_LEN else WAN_TEXT_LEN
        return cls(model.to(device), tokenizer, text_len)

    def offload(self, device: torch.device) -> None:
        """As that of every encoder; its table of words is looked up on the CPU."""
        self._line = offload(self.model, device, self.model.get_input_embeddings())

    @torch.no_grad()
    def encode(self, prompts: list[str], *, places: Sequence[str] = ()) -> Tensor:
        """float32 [B, M, D]; rows past a prompt's `</s>` are exactly 0. The empty prompt is `</s>` alone.

        Args: `places` names each prompt in the warning that it was cut; without, its beginning does.
        Raises: DataError when a prompt is no text.
        Source: Wan2.1; spec C.1.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise DataError(f"prompts must be a non-empty list of strings; got {type(prompts).__name__} {prompts!r}")
        if broken := [p for p in prompts if printable(p) != p]:
            raise DataError(f"the prompt {broken[0]!r} holds half a character (a lone surrogate); write it again")
        # Always padded to the full length, so that a prompt's rows do not depend on the others of its batch.
        cleaned = [clean_prompt(p) for p in prompts]
        with ONE_THREAD, reading("the files of the tokenizer are damaged; download them again"):
            tokens = self.tokenizer(
                cleaned,
                padding="max_length",
                max_length=self.text_len,
                truncation=True,
                add_special_tokens=True,
                return_attention_mask=True,
                return_tensors="pt",
            ).to(self.device)
        self._say_unknown(cleaned, tokens.encodings or ())
        mask = tokens.attention_mask
        if bool(mask[:, -1].any()):
            full = mask[:, -1].nonzero()[:, 0].tolist()
            self._say_cut([places[k] if places else f"the prompt {prompts[k][:40]!r}..." for k in full])
        if int(tokens.input_ids.max()) >= self.model.config.vocab_size:
            raise CheckpointError("the tokenizer knows more words than the text encoder; their files are of two models")
        with self.working():
            table = self.model.get_input_embeddings()
            embedded = table(tokens.input_ids.to(table.weight.device)).to(self.device)
            hidden = self.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        # Not a product with the mask: it would keep NaN and give -0.
        return hidden.float().masked_fill(~mask.bool()[..., None], 0.0)

    def _say_unknown(self, prompts: Sequence[str], encodings: Sequence[Any]) -> None:
        """Names the words that the tokenizer does not know, once each: all of them read alike."""
        unknown, new = self.tokenizer.unk_token_id, dict[str, None]()
        for prompt, encoding in zip(prompts, encodings):
            spans = (span for token, span in zip(encoding.ids, encoding.offsets) if token == unknown)
            new |= dict.fromkeys(prompt[start:end] for start, end in spans)
        if words := [word for word in new if word and word not in self._unknown]:
            if len(self._unknown) + len(words) > _MOST_REMEMBERED:
                self._unknown.clear()  # a server meets new ones for as long as it runs
            self._unknown.update(words[:_MOST_REMEMBERED])
            named = f"{', '.join(words[:_MOST_NAMED])}{', ...' if len(words) > _MOST_NAMED else ''}"
            log.warning("These weights do not know what is meant by: %s; it says nothing to them", named)

    def _say_cut(self, places: list[str]) -> None:
        """Names each prompt once, however often it is encoded."""
        new = [place for place in dict.fromkeys(places) if place not in self._cut]
        for number, place in enumerate(new, len(self._cut)):
            if number < _MOST_NAMED:
                log.warning("%s fills all %d tokens of the text encoder and may have been cut", place, self.text_len)
            elif number == _MOST_NAMED:
                log.warning("Further prompts fill the text encoder too; they are not named")
        self._cut.update(new[: _MOST_NAMED + 1 - len(self._cut)])  # after those nothing is said
