"""The machinery of configuration: strict models, YAML, `a.b=c` overrides, and errors that name key, value and rule.

It must know no field of any configuration; those are in `longtake/config.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from longtake.errors import ConfigError


class Settings(BaseModel):
    """Base of every configuration model: frozen, strict types, finite numbers, unknown keys refused, errors as
    ConfigError.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self)) from None

    # Without this mark pydantic would call __init__ for nested models too, and an error would lose its dotted path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        """The model of a nested dict, e.g. of a resolved configuration read back.

        Raises: ConfigError naming every wrong key with its dotted path, the value got and the rule.
        """
        return cls(**tree)

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        """Names that users of other code bases will try, with what each is called here."""
        return {}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.1 makes it text) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises: ConfigError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ConfigError when it is missing, unreadable or no mapping of names."""
    if not path.is_file():
        raise ConfigError(f"config {path} is not a file; give the path of a YAML file, e.g. configs/toy/i2v.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not UTF-8 text") from None
    tree = parse_yaml(text, f"config {path}")
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"config {path} must be a mapping of keys to values")
    return tree


def split_override(override: str) -> tuple[list[str], Any]:
    """Key path and value of one `a.b=c`; the value is read as YAML. Raises: ConfigError when it has another form."""
    key, sign, text = override.partition("=")
    path = key.strip().split(".")
    if not sign or not all(path):
        raise ConfigError(f"override {override!r} must have the form key=value with a dotted key, e.g. optim.lr=1e-4")
    return path, parse_yaml(text, f"the value of override {override!r}")


def set_path(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Writes `value` at a dotted path of a nested dict, making the mappings on the way.

    Raises: ConfigError when the path goes through a plain value.
    """
    for depth, key in enumerate(path[:-1]):
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], dict):
            raise ConfigError(
                f"override {'.'.join(path)}: {'.'.join(path[: depth + 1])} is a plain value and has no keys"
            )
        tree = tree[key]
    tree[path[-1]] = value


def nested_model(annotation: Any) -> type[Settings] | None:
    """The configuration model inside a field's annotation (`M`, `M | None`, `dict[str, M]`), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        if argument is not NoneType and (model := nested_model(argument)) is not None:
            return model
    return None


def describe(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yields (dotted key, type, default, description) of every value of a model; `...` = no default."""
    for name, field in model.model_fields.items():
        inner = nested_model(field.annotation)
        if inner is not None:
            each = ".<name>" if get_origin(field.annotation) is dict else ""
            yield from describe(inner, f"{prefix}{name}{each}.")
            continue
        default = ... if field.is_required() else field.get_default(call_default_factory=True)
        annotation = getattr(field.annotation, "__name__", None) if not get_args(field.annotation) else None
        kind = annotation or str(field.annotation).replace("typing.", "")
        yield prefix + name, kind, default, field.description or ""


def explain(error: ValidationError, model: type[Settings]) -> ConfigError:
    """The ConfigError of a pydantic error: one line a mistake, each with dotted key, value got and rule."""
    return ConfigError("\n".join(_line(detail, model) for detail in error.errors()))


def _line(detail: ErrorDetails, model: type[Settings]) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path}{_suggestion(detail['loc'], model)}"
    if detail["type"] == "missing":
        return f"{path}: missing; this key has no default and must be given"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}" if path else str(detail["ctx"]["error"])
    rule = detail["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
    return f"{path}: got {detail['input']!r}; {rule}"


def _suggestion(loc: tuple[int | str, ...], root: type[Settings]) -> str:
    owner, prefix = root, ""
    base, base_prefix = (
        root,
        "",
    )  # the model whose values the user is writing: the root, or one model of a dict of models
    for part in loc[:-1]:
        prefix += f"{part}."
        field = owner.model_fields.get(str(part))
        if field is None:
            base, base_prefix = owner, prefix
        elif (inner := nested_model(field.annotation)) is not None:
            owner = inner
    wrong = str(loc[-1])
    if (familiar := base.familiar_names().get(wrong)) is not None:
        return f"; here it is {familiar}"
    near = [prefix + key for key in difflib.get_close_matches(wrong, owner.model_fields, n=3)]
    leaves: dict[str, list[str]] = {}
    for key, *_ in describe(base):
        leaves.setdefault(key.rpartition(".")[2], []).append(base_prefix + key)
    for leaf in difflib.get_close_matches(wrong, leaves, n=2):
        near += [key for key in leaves[leaf] if key not in near]
    known = f"the keys of {prefix.rstrip('.') or 'the top level'} are {', '.join(owner.model_fields)}"
    return f"; did you mean {' or '.join(near[:3])}?" if near else f"; {known}"
