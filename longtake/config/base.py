"""The machinery of configuration: strict models, YAML, `extends`, `a.b=c` overrides, errors that name key and rule.

It must know no field of any configuration; those are in `longtake/config/stage.py`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from longtake.errors import ConfigError, nearest


def _in_full(path: str) -> str:
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise ValueError(f"{path!r} names no home folder; write the path in full, or ./~... for a name with ~")
    if "\0" in full or max(len(part.encode(errors="replace")) for part in full.split("/")) > 255:
        raise ValueError(f"{path[:80]!r}... is no path: names have at most 255 bytes, none of them 0")
    return full


# Text that names a file or folder, or may do so: `~` at its begin is the home folder.
PathText = Annotated[str, AfterValidator(_in_full)]


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
            raise explain(error, type(self), values) from None

    @field_validator("*")
    @classmethod
    def _is_usual(cls, value: Any) -> Any:
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise ValueError(f"{value!r} is not UTF-8 text; write it with whole characters")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError(f"{value} is too large; it must be below 2^63")
        return value

    # Without this mark pydantic would call __init__ for nested models too, and an error would lose its dotted path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        """The model of a nested dict, e.g. of a resolved configuration read back.

        Raises: ConfigError naming every wrong key with its dotted path, the value got and the rule.
        """
        return cls(**tree)

    def but(self, **changes: Any) -> Self:
        """The same with other values. Raises: ConfigError, as where it is made."""
        return type(self)(**{**dict(self), **changes})

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        """Names that users of other code bases will try, or that keys had before, with what each is called here."""
        return {}

    @classmethod
    def chosen(cls, values: Any) -> type[Settings]:
        """The model that these values are read as: another one where one of them chooses. Raises: ConfigError."""
        return cls

    @classmethod
    def choices(cls) -> dict[str, type[Settings]]:
        """The models that there are to choose from, by what chooses them; empty where there is no choice."""
        return {}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, and whose numbers are what people mean: `1e-4` is one (text in YAML
    1.1), and `010`, `1:30` and dates are text (8, 90 and objects).
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                problem = f"key {key.value!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _TextLoader(yaml.BaseLoader):
    """Reads every value as text, whatever it looks like."""


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]{1,16})$",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_YAML = "tag:yaml.org,2002:"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_YAML) not in (*_NUMBERS, "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _rule in _NUMBERS.items():
    _StrictLoader.add_implicit_resolver(_YAML + _name, re.compile(_rule), list("-+.0123456789"))


def parse_yaml(text: str, where: str, loader: type = _StrictLoader) -> Any:
    """The value of a YAML text. Raises: ConfigError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a number too long, of brackets too deep
        raise ConfigError(
            f"{where} is not valid YAML: {' '.join(str(error).split())[:400]}; text with signs of YAML "
            "({ [ # : * & ! % @) goes in quotes"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ConfigError when it is missing, unreadable or no mapping of names."""
    if not path.is_file():
        raise ConfigError(f"config {path} is not a file; give the path of a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read ({error.strerror}); check its permissions") from None
    tree = parse_yaml(text, f"config {path}")
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"config {path} must be a mapping of keys to values")
    return tree


# The files of a recipe with what each of them says; a later one has the last word.
Sources = list[tuple[Path, dict[str, Any]]]


def read_recipe(path: Path, tree: Any = None, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Sources]:
    """The mapping in a recipe (or `tree`, a part of one) on top of the file that it `extends`, and who says what.

    Mappings are merged; everything else, null too, replaces what the base says.
    Raises: ConfigError when a file is missing, holds no mapping, or extends itself.
    """
    own = deepcopy(read_yaml(path) if tree is None else tree)
    base = own.pop("extends", None)
    if base is None:
        return own, [(path, deepcopy(own))]
    if not isinstance(base, str):
        raise ConfigError(
            f"config {path}: extends: got {base!r}; must be the path of one YAML file, seen from this one"
        )
    try:
        file = path.parent / _in_full(base)
    except ValueError as error:
        raise ConfigError(f"config {path}: extends: {error}") from None
    if not file.is_file():
        raise ConfigError(
            f"config {path} extends {base}, but {file} is no file; a path begins where the file that says it is"
        )
    chain = (*above, path)
    if any(file.samefile(known) for known in chain):
        raise ConfigError(
            f"config {' extends '.join(map(str, (*chain, file)))}: a loop; take one of these `extends` out"
        )
    below, sources = read_recipe(file, above=chain)
    try:
        return _merged(below, own), [*sources, (path, deepcopy(own))]
    except RecursionError:
        raise ConfigError(f"config {path}: a mapping of it holds itself (&, *); write its values out") from None


def _merged(below: Any, tree: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(tree, dict):
        return tree
    return below | {key: _merged(below.get(key), value) for key, value in tree.items()}


def said_in(sources: Sources, key: Sequence[str]) -> Path | None:
    """The file that has the last word on a dotted key; None when no file names it."""
    for file, tree in reversed(sources):
        for name in key:
            tree = tree.get(name, Ellipsis) if isinstance(tree, dict) else Ellipsis
        if tree is not Ellipsis:
            return file
    return None


def located(error: ConfigError, sources: Sources) -> ConfigError:
    """The error with the file of each wrong key, where that is not the recipe itself (the last of `sources`)."""
    lines = []
    for line in str(error).splitlines():
        key = re.match(r"(?:unknown key )?([\w.-]+)", line)
        file = said_in(sources, key[1].split(".")) if key else None
        lines.append(line if file in (None, sources[-1][0]) else f"{line} (in {file})")
    return ConfigError("\n".join(lines))


def split_override(override: str) -> tuple[list[str], str]:
    """Key path and text of one `a.b=c`. Raises: ConfigError when it has another form."""
    key, sign, text = override.partition("=")
    path = key.strip().split(".")
    if not sign or not all(path):
        raise ConfigError(f"override {override!r} must have the form key=value with a dotted key, e.g. optim.lr=1e-4")
    return path, text.lstrip() if key != key.rstrip() else text  # `a = b`


def set_path(tree: dict[str, Any], path: Sequence[str], text: str, model: type[Settings]) -> Any:
    """Writes what `text` means for the value of `model` at a dotted path into a nested dict, making the mappings on the
    way, and returns it.

    Raises: ConfigError when the path goes through a plain value, or the text is no such value.
    """
    key = ".".join(path)
    value = _typed(text, _alternatives(_annotation(model, path, tree)), f"the value of override '{key}={text}'")
    for depth, name in enumerate(path[:-1]):
        if tree.get(name) is None:
            tree[name] = {}
        if not isinstance(tree[name], dict):
            raise ConfigError(f"override {key}: {'.'.join(path[: depth + 1])} is a plain value and has no keys")
        tree = tree[name]
    tree[path[-1]] = value
    return value


def _typed(text: str, kinds: Sequence[Any], where: str) -> Any:
    """The value of a text where one of `kinds` is wanted: text as it is typed (or in quotes), all else as YAML."""
    wanted = [kind for kind in kinds if kind is not NoneType]
    if len(wanted) < len(kinds) and text in ("", "~", "null"):
        return None
    if wanted and all(map(_is_text, wanted)):
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
            return text
        try:
            quoted = parse_yaml(text, where, _TextLoader)
        except ConfigError:  # it begins and ends with words in quotes
            return text
        return quoted if isinstance(quoted, str) else text
    of_text = wanted and all(get_origin(kind) is list and _is_text(get_args(kind)[0]) for kind in wanted)
    return parse_yaml(text, where, _TextLoader if of_text else _StrictLoader)


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _alternatives(annotation: Any) -> list[Any]:
    """The types that `A | B` allows, without their rules."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [annotation]


def _annotation(annotation: Any, path: Sequence[str], tree: Any) -> Any:
    """The annotation of the value at a dotted path of a model; None where there is no such key.

    Args: `tree`, the values of the model so far, which may choose it.
    """
    if not path:
        return annotation
    model = nested_model(annotation)
    if model is None:
        return None
    below = tree.get(path[0]) if isinstance(tree, dict) else None
    if get_origin(annotation) is dict:
        return _annotation(model, path[1:], below)
    field = model.chosen(tree).model_fields.get(path[0])
    return None if field is None else _annotation(field.annotation, path[1:], below)


def nested_model(annotation: Any) -> type[Settings] | None:
    """The configuration model inside a field's annotation (`M`, `M | None`, `dict[str, M]`), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        if argument is not NoneType and (model := nested_model(argument)) is not None:
            return model
    return None


def describe(model: type[Settings], prefix: str = "", note: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yields (dotted key, type, default, description) of every value of a model, and of those to choose from; `...` =
    no default. Descriptions begin with `note`.
    """
    for name, (field, kinds) in _fields(model).items():
        told = f"{note}{', '.join(kinds)}: " if kinds else note
        inner = nested_model(field.annotation)
        if inner is not None:
            each = ".<name>" if get_origin(field.annotation) is dict else ""
            yield from describe(inner, f"{prefix}{name}{each}.", told)
            continue
        default = ... if field.is_required() else field.get_default(call_default_factory=True)
        types = ["None" if kind is NoneType else _kind_name(kind) for kind in _alternatives(field.annotation)]
        yield prefix + name, " | ".join(types), default, told + (field.description or "")


def _fields(model: type[Settings]) -> dict[str, tuple[FieldInfo, list[str]]]:
    """The fields of a model and of those to choose from, each with the choices that have it, where not all do."""
    found: dict[str, tuple[FieldInfo, list[str]]] = {name: (field, []) for name, field in model.model_fields.items()}
    for kind, other in model.choices().items():
        for name, field in other.model_fields.items():
            if name not in model.model_fields:
                found.setdefault(name, (field, []))[1].append(kind)
    return found


def _kind_name(kind: Any) -> str:
    return str(kind).replace("typing.", "") if get_args(kind) else kind.__name__


def explain(error: ValidationError, model: type[Settings], values: Any = None) -> ConfigError:
    """The ConfigError of a pydantic error: one line a mistake, each with dotted key, value got and rule."""
    return ConfigError("\n".join(_line(detail, model, values) for detail in error.errors()))


def _line(detail: ErrorDetails, model: type[Settings], values: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path}{_suggestion(detail['loc'], model, values)}"
    if detail["type"] == "missing":
        return f"{path}: missing; this key has no default and must be given"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}" if path else str(detail["ctx"]["error"])
    rule = detail["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
    if detail["type"] == "string_type":
        rule += f"; text that YAML takes for something else goes in quotes, e.g. {path.rpartition('.')[2]}: '2024'"
    if detail["type"] == "literal_error":
        rule += nearest(str(detail["input"]), re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    return f"{path}: got {detail['input']!r}; {rule}"


def _suggestion(loc: tuple[int | str, ...], root: type[Settings], values: Any) -> str:
    owner, prefix = root, ""
    base, base_prefix = root, ""  # the model whose values the user is writing: the root, or one of a dict of models
    elsewhere: list[str] = []  # other choices that have the key
    wrong = str(loc[-1])
    for part in loc[:-1]:
        prefix += f"{part}."
        values = values.get(part) if isinstance(values, Mapping) else None
        field = owner.model_fields.get(str(part))
        if field is None:
            base, base_prefix = owner, prefix
        elif (inner := nested_model(field.annotation)) is not None:
            owner = inner.chosen(values)
            elsewhere = [kind for kind, other in inner.choices().items() if wrong in other.model_fields]
    if elsewhere:
        return f"; it belongs to {prefix}kind={' and '.join(elsewhere)}: remove it, or change the kind"
    familiar = base.familiar_names() | owner.familiar_names()
    if wrong in familiar:
        return f"; here it is {familiar[wrong]}"
    near = [prefix + key for key in difflib.get_close_matches(wrong, owner.model_fields, n=3)]
    leaves: dict[str, list[str]] = {}
    for key, *_ in describe(base):
        leaves.setdefault(key.rpartition(".")[2], []).append(base_prefix + key)
    for leaf in difflib.get_close_matches(wrong, leaves, n=2):
        near += [key for key in leaves[leaf] if key not in near]
    known = f"the keys of {prefix.rstrip('.') or 'the top level'} are {', '.join(owner.model_fields)}"
    return f"; did you mean {' or '.join(near[:3])}?" if near else f"; {known}"
