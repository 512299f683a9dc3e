"""A Hugging Face hub of local folders, in place of the one behind a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from pytest import MonkeyPatch
from safetensors import safe_open


class FakeHub:
    """`hub(name)` is the folder of a repository; `asked`, names of repositories whose files were listed; `fetched`, the
    files that were, once for each time; `offline`, whether there is no network: then the cache alone is there.
    """

    def __init__(self, root: Path, monkeypatch: MonkeyPatch) -> None:
        self.root = root
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.offline: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "model_info", self._model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot_download)
        monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", self._head)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self._in_cache)

    def __call__(self, name: str) -> Path:
        return self.root / "remote" / name

    def cache(self, name: str) -> Path:
        """Where fetched files of a repository lie."""
        return self.root / "cache" / name

    def _model_info(self, name: str, *, files_metadata: bool, timeout: float) -> Any:
        assert files_metadata and timeout <= 5
        self.asked.append(name)
        if self.offline is not None:
            raise self.offline
        if not self(name).is_dir():
            raise _not_found(name)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f, size=s) for f, s in self._files(name).items()])

    def _files(self, name: str) -> dict[str, int]:
        files = (path for path in sorted(self(name).rglob("*")) if path.is_file())
        return {path.relative_to(self(name)).as_posix(): path.stat().st_size for path in files}

    def _snapshot_download(
        self,
        name: str,
        *,
        allow_patterns: list[str] | None = None,
        local_dir: Path | None = None,
        local_files_only: bool = False,
        tqdm_class: type | None = None,
    ) -> str:
        cache = self.cache(name) if local_dir is None else Path(local_dir)
        if local_files_only and not cache.is_dir():
            raise errors.LocalEntryNotFoundError(f"{name} is not cached")
        if local_files_only:
            return str(cache)
        if self.offline is not None:
            raise self.offline
        for file in self._files(name):
            if file in (allow_patterns or ()):
                if not (cache / file).exists():
                    self.fetched.append(file)
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self(name) / file, cache / file)
        cache.mkdir(parents=True, exist_ok=True)
        return str(cache)

    def _head(self, name: str, file: str) -> Any:
        with safe_open(self(name) / file, "pt") as opened:
            return SimpleNamespace(tensors=dict.fromkeys(opened.keys()))

    def _in_cache(self, name: str, file: str) -> str | None:
        place = self.cache(name) / file
        return str(place) if place.is_file() else None


def _not_found(name: str) -> Exception:
    import httpx2

    answer = httpx2.Response(404, request=httpx2.Request("GET", f"https://hub/{name}"))
    return errors.RepositoryNotFoundError(f"404 {name}", response=answer)
