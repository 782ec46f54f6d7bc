"""An experiment as JSON with qualified names, and back.

Names resolve only inside `steerlab.`, and only to what the named module itself defines, so reading a stranger's
manifest runs no code but ours, and no layer has to import the recipes above it. Left out: versioned migrations.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlab.errors import UsageError, unknown

_PACKAGE = "steerlab"


def _qualified(thing: type | Any) -> str:
    name = f"{thing.__module__}:{thing.__qualname__}"
    if not _is_ours(thing.__module__) or "<" in thing.__qualname__:
        raise UsageError(f"{name} cannot be stored in a run: only top-level names inside {_PACKAGE} can be found again")
    return name


def _is_ours(module: str) -> bool:
    return module == _PACKAGE or module.startswith(f"{_PACKAGE}.")


def encode(obj: Any) -> Any:
    """JSON value of dataclasses, enums, tuples, sets, dicts, paths, functions and plain values; `decode` inverts it.

    A dataclass becomes `{"$type": "steerlab.tasks.gym:Gym", field: value, …}`. Raises UsageError for anything that
    could not be read back (a lambda, a class outside steerlab).
    """
    if obj is None or (isinstance(obj, bool | int | str) and not isinstance(obj, enum.Enum)):
        return obj
    if isinstance(obj, enum.Enum):
        return {"$enum": _qualified(type(obj)), "name": obj.name}
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else {"$float": repr(float(obj))}
    if hasattr(obj, "item") and getattr(obj, "shape", None) == ():  # numpy and torch scalars
        return encode(obj.item())
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = {f.name: encode(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
        return {"$type": _qualified(type(obj)), **fields}
    if isinstance(obj, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in obj):
            return {key: encode(value) for key, value in obj.items()}
        return {"$dict": [[encode(key), encode(value)] for key, value in obj.items()]}
    if isinstance(obj, tuple):
        return {"$tuple": [encode(item) for item in obj]}
    if isinstance(obj, set | frozenset):
        kind = "$frozenset" if isinstance(obj, frozenset) else "$set"
        return {kind: sorted((encode(item) for item in obj), key=lambda value: json.dumps(value, sort_keys=True))}
    if isinstance(obj, list):
        return [encode(item) for item in obj]
    if isinstance(obj, Path):
        return {"$path": str(obj)}
    if isinstance(obj, type) or (callable(obj) and hasattr(obj, "__qualname__")):
        return {"$name": _qualified(obj)}
    raise UsageError(
        f"a {type(obj).__name__} cannot be stored in a run; use a dataclass, numbers, text, lists or dicts"
    )


def decode(value: Any) -> Any:
    """Inverse of `encode`. Raises UsageError for a name outside steerlab, an unknown type or an unknown field."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$type" in value:
        return _dataclass({**value})
    if "$enum" in value:
        kind = _resolve(value["$enum"])
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            raise UsageError(f"{value['$enum']} is not an enum; the file was changed or comes from another version")
        if value.get("name") not in kind.__members__:
            raise unknown(kind.__name__, str(value.get("name")), kind.__members__)
        return kind[value["name"]]
    readers = {
        "$tuple": lambda items: tuple(decode(item) for item in items),
        "$set": lambda items: {decode(item) for item in items},
        "$frozenset": lambda items: frozenset(decode(item) for item in items),
        "$dict": lambda items: {decode(key): decode(item) for key, item in items},
        "$path": Path,
        "$float": float,
        "$name": _resolve,
    }
    for tag, read in readers.items():
        if tag in value:
            return read(value[tag])
    return {key: decode(item) for key, item in value.items()}


def _resolve(name: object) -> Any:
    module, _, qualname = str(name).partition(":")
    if not _is_ours(module) or not qualname:
        raise UsageError(f"refusing the name {name!r}: a run may only name things inside {_PACKAGE}")
    try:
        thing: Any = importlib.import_module(module)
        for part in qualname.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"this version of steerlab has no {name!r}; use the version named in the manifest") from error
    # what a module merely imported (os.system) is reachable through it but is not its own
    if (getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)) != (module, qualname):
        raise UsageError(f"refusing the name {name!r}: it is not defined in {module}")
    return thing


def _dataclass(value: dict[str, Any]) -> Any:
    name = value.pop("$type")
    kind = _resolve(name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UsageError(f"{name} is not a dataclass; the file was changed or comes from another version of steerlab")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in value:
        if key not in fields:
            raise unknown(f"field of {kind.__name__}", key, fields)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in value:
            raise UsageError(f"{name} lacks the field {key!r}; the file was changed or comes from another version")
    return kind(**{key: decode(item) for key, item in value.items()})
