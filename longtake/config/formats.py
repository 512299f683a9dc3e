"""The formats of data sets by name, so that a recipe is checked without a reader being imported."""

from __future__ import annotations

from longtake.errors import ConfigError

# Formats of data sets -> the class that reads each, imported when it is needed. A path is asked for them in this order:
# captions are text files too, so that texts come last. A new format is a file with its class and a line here.
FORMATS = {
    "encoded": "longtake.data.encoded:EncodedRows",
    "lmdb": "longtake.data.lmdb:LmdbShards",
    "webdataset": "longtake.data.tar:TarShards",
    "images": "longtake.data.files:ImageFolder",
    "clips": "longtake.data.files:ClipFolder",
    "texts": "longtake.data.files:TextRows",
}


def check_format(kind: str) -> str:
    """The name of a format, or `auto`. Raises: ConfigError when it is neither."""
    if kind not in ("auto", *FORMATS):
        raise ConfigError(f"{kind!r} is no data format; give auto or one of {', '.join(FORMATS)}")
    return kind
