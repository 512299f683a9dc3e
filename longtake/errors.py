"""The exceptions a user can meet. Every message says what was got, the rule, and the fix."""


class LongtakeError(Exception):
    """Base class of every error that Longtake raises on purpose."""


class ConfigError(LongtakeError):
    """A configuration value, or a combination of values, breaks a rule."""


class DataError(LongtakeError):
    """A data row, an image, a video or a dataset folder cannot be used."""


class OutputError(DataError):
    """A file or folder cannot be written where it was asked for."""


class ShapeError(LongtakeError):
    """A tensor has a shape, a dtype or a range that the callee does not accept."""


class CheckpointError(LongtakeError):
    """A checkpoint or a weight file is missing, damaged, or does not fit the model."""


class CacheError(LongtakeError):
    """A key/value cache was asked to do something that would corrupt a result."""


class TrainingError(LongtakeError):
    """Training cannot go on: a non-finite loss or gradient, ranks that disagree, a failed save."""
