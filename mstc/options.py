"""The options of the backend: `torch.compile(..., backend="mstc", options={...})`.

A pass's name is a key; its value is True, False or a dict of that pass's settings, and a
dict turns the pass on. Everything is checked before a graph is touched: an unknown key, a
misspelt name, a wrong type or value raises `mstc.errors.OptionError`, which names the key,
what was given and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mstc.errors import OptionError

__all__ = [
    "PASSES",
    "Budget",
    "LmHead",
    "Masks",
    "MiniSequence",
    "Options",
    "QueryChunks",
    "Recompute",
    "WrittenAttention",
    "parse_options",
]

ChunkTokens = int | Literal["auto"]


@dataclass(frozen=True)
class Masks:
    """Recover causal, sliding-window and per-document structure from explicit masks."""

    enabled: bool = True


@dataclass(frozen=True)
class MiniSequence:
    """Run tokenwise regions chunk by chunk; ``chunk_tokens`` is a count or "auto"."""

    enabled: bool = True
    chunk_tokens: ChunkTokens = "auto"


@dataclass(frozen=True)
class WrittenAttention:
    """Attention written out as matmul, softmax, matmul becomes ``scaled_dot_product_attention`` where that is equal."""

    enabled: bool = True


@dataclass(frozen=True)
class QueryChunks:
    """Run other written-out attention by chunks of queries; ``chunk_tokens`` is a count of queries or "auto"."""

    enabled: bool = True
    chunk_tokens: ChunkTokens = "auto"


@dataclass(frozen=True)
class LmHead:
    """Run head and loss chunk by chunk, gradients in the forward; ``chunk_tokens`` as in `MiniSequence`."""

    enabled: bool = True
    chunk_tokens: ChunkTokens = "auto"


@dataclass(frozen=True)
class Recompute:
    """Choose what is saved and what is recomputed.

    offload: under a memory budget, values may wait for the backward in pinned host memory (CUDA) or in files (CPU);
    checkpoints: blocks under ``torch.utils.checkpoint`` are part of the "plan", or "keep" what their user wrote.
    """

    enabled: bool = True
    offload: bool = False
    checkpoints: Literal["plan", "keep"] = "plan"


@dataclass(frozen=True)
class Budget:
    """The peak to stay under, in bytes; ``outside`` is held by what this graph cannot see ("auto": what is in use)."""

    total: int
    outside: int | Literal["auto"] = 0


@dataclass(frozen=True)
class Options:
    """Checked options; `parse_options` makes them.

    asked: the passes that the caller turned on by name, which ``strict`` holds to their word.
    """

    masks: Masks = Masks()
    written_attention: WrittenAttention = WrittenAttention()
    query_chunks: QueryChunks = QueryChunks()
    mini_sequence: MiniSequence = MiniSequence()
    lm_head: LmHead = LmHead()
    recompute: Recompute = Recompute()
    memory_budget: Budget | None = None
    accumulate: Literal["float32", "param"] = "float32"
    unused_outputs: tuple[int | str, ...] = ()
    lower: Literal["inductor", "aot_eager", "eager"] = "inductor"
    strict: bool = False
    verify: bool = False
    dump: str | None = None
    asked: frozenset[str] = frozenset()

    def enabled(self, pass_name: str) -> bool:
        """Whether the pass runs. Passes that are not built yet never do; an unknown name is an `OptionError`."""
        if pass_name in _RECORDS:
            return bool(getattr(self, pass_name).enabled)
        if pass_name == "memory_budget":
            return self.memory_budget is not None
        if pass_name in PASSES:
            return False
        raise OptionError(_unknown("pass", pass_name, PASSES))

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether blocks under ``torch.utils.checkpoint`` run again as they were written; under a budget never."""
        kept = self.recompute.checkpoints == "keep" or not self.recompute.enabled
        return kept and self.memory_budget is None

    def to_dict(self) -> dict[str, object]:
        """The options as JSON types, each in the form in which a caller would write it."""
        values: dict[str, object] = {name: _written(getattr(self, name)) for name in _RECORDS}
        plain = (f.name for f in fields(self) if f.name not in _RECORDS and f.name != "asked")
        values |= {name: getattr(self, name) for name in plain}
        values["unused_outputs"] = list(self.unused_outputs)
        values["memory_budget"] = asdict(self.memory_budget) if self.memory_budget else None
        return values


def parse_options(options: Mapping[str, Any] | None = None) -> Options:
    """Check ``options`` (None: all defaults) and return them as `Options`.

    Raises `OptionError` on an unknown key, a wrong type or value, and on a request for
    something that is not built yet.
    """
    if options is None:
        return Options()
    if not isinstance(options, Mapping):
        raise OptionError(f"options must be a dict or None, got {_shown(options)}")
    parsed: dict[str, Any] = {}
    for key, value in options.items():
        if key not in _KEYS:
            raise OptionError(_unknown("option", key, _KEYS))
        checked = _check_key(key, value)
        if key in _KEPT:
            parsed[key] = checked
    kept = parsed.get("recompute", Recompute()).checkpoints == "keep"
    if kept and parsed.get("memory_budget") is not None:
        raise OptionError(
            "option 'recompute.checkpoints' is 'keep', but under a 'memory_budget' the plan chooses what runs again; "
            "leave one of the two out"
        )
    if parsed.get("recompute", Recompute()).offload and parsed.get("lower") == "eager":
        raise OptionError(
            "option 'recompute.offload' needs a compiled backward: give 'lower' \"inductor\" or \"aot_eager\""
        )
    asked = frozenset(name for name in _RECORDS if options.get(name, False) is not False)
    return Options(**parsed, asked=asked)


# ------------------------------------------------------------------ checks of single values


@dataclass(frozen=True)
class _Rule:
    """What a value may be: ``check`` decides, ``allowed`` says so in words."""

    allowed: str
    check: Callable[[Any], bool]


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count_or_auto(value: object) -> bool:
    return _is_int(value, 1) or (isinstance(value, str) and value == "auto")


def _one_of(*words: str) -> _Rule:
    *most, last = (f'"{w}"' for w in words)
    return _Rule(f"{', '.join(most)} or {last}", lambda v: isinstance(v, str) and v in words)


def _is_outputs(value: object) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(v, 0) or (isinstance(v, str) and v != "") for v in value)


def _is_bytes(value: object, least: int = 1) -> bool:
    if isinstance(value, str):
        return _BYTES_PATTERN.fullmatch(value) is not None and _in_bytes(value) >= least
    return _is_int(value, least)


_BYTES_PATTERN = re.compile(r"(\d+(\.\d+)?)\s*([KMGT]i?)?B")
_ANY = _Rule("a torch.distributed DeviceMesh", lambda v: v is not None)
_BOOL = _Rule("True or False", lambda v: isinstance(v, bool))
_CHUNK = _Rule('a number of tokens (an int above 0) or "auto"', _is_count_or_auto)
_COUNT = _Rule("an int above 0", lambda v: _is_int(v, 1))
_COUNT_FROM_0 = _Rule("an int from 0 on", lambda v: _is_int(v, 0))
_NUMBER = _Rule("a number above 0", _is_number)
_NUMBER_OR_NONE = _Rule("None or a number above 0", lambda v: v is None or _is_number(v))
_WORD = _Rule("a string", lambda v: isinstance(v, str) and v != "")
_BYTES = _Rule('bytes (an int above 0) or a string such as "20GiB"', _is_bytes)
_BYTES_OR_AUTO = _Rule(
    'bytes (an int from 0 on), a string such as "20GiB", or "auto"', lambda v: v == "auto" or _is_bytes(v, 0)
)

_SETTINGS: dict[str, dict[str, _Rule]] = {
    "masks": {},
    "written_attention": {},
    "query_chunks": {"chunk_tokens": _CHUNK},
    "mini_sequence": {"chunk_tokens": _CHUNK},
    "lm_head": {"chunk_tokens": _CHUNK},
    "recompute": {"offload": _BOOL, "checkpoints": _one_of("plan", "keep")},
    "experts": {},
    "attention": {
        "kind": _WORD,
        "layers": _WORD,
        "window": _COUNT,
        "sinks": _COUNT_FROM_0,
        "keep_below": _CHUNK,
        "max_error": _NUMBER,
    },
    "shard_sequence": {
        "mesh": _ANY,
        "inputs": _one_of("full", "sharded"),
        "gradients": _one_of("summed", "local"),
        "method": _one_of("auto", "ring", "all_gather", "all_to_all"),
    },
    "shard_experts": {"mesh": _ANY, "capacity": _NUMBER_OR_NONE},
}
PASSES: tuple[str, ...] = tuple(_SETTINGS)

_VALUES: dict[str, _Rule] = {
    "accumulate": _one_of("float32", "param"),
    "unused_outputs": _Rule("a list or tuple of output positions (from 0 on) and output names", _is_outputs),
    "lower": _one_of("inductor", "aot_eager", "eager"),
    "strict": _BOOL,
    "verify": _BOOL,
    "dump": _Rule("None or a folder (a string or path)", lambda v: v is None or isinstance(v, str | os.PathLike)),
}
_BUDGET = {"total": _BYTES, "outside": _BYTES_OR_AUTO}

_RECORDS: dict[str, type] = {
    "masks": Masks,
    "written_attention": WrittenAttention,
    "query_chunks": QueryChunks,
    "mini_sequence": MiniSequence,
    "lm_head": LmHead,
    "recompute": Recompute,
}
_KEYS: tuple[str, ...] = (*PASSES, "memory_budget", *_VALUES)
_KEPT = frozenset(f.name for f in fields(Options))


# ------------------------------------------------------------------ checks of keys


def _check_key(key: str, value: Any) -> Any:
    """The checked value of one key, as `Options` keeps it."""
    if key in _RECORDS:
        return _check_pass(key, value)
    if key in PASSES:
        return _check_unbuilt_pass(key, value)
    if key == "memory_budget":
        return _check_budget(value)
    _check_value(key, value, _VALUES[key])
    if key == "dump" and value is not None:
        return os.fspath(value)
    return tuple(value) if key == "unused_outputs" else value


def _check_pass(name: str, value: Any) -> Any:
    settings = _check_settings(name, value)
    return _RECORDS[name](enabled=value is not False, **settings)


def _check_unbuilt_pass(name: str, value: Any) -> None:
    if value is None:
        return
    _check_settings(name, value)
    if value is not False:
        raise _not_built(name, value, "False")


def _check_budget(value: Any) -> Budget | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        _check_value("memory_budget", value, _BYTES)
        return Budget(_in_bytes(value))
    _check_mapping("memory_budget", value, _BUDGET)
    if "total" not in value:
        raise OptionError(f"option 'memory_budget' needs 'total': {_BUDGET['total'].allowed}")
    outside = value.get("outside", 0)
    return Budget(_in_bytes(value["total"]), outside if outside == "auto" else _in_bytes(outside))


def _in_bytes(value: int | str) -> int:
    """Bytes of "20GiB" (2**30 each), "20GB" (10**9 each) or a plain number."""
    if isinstance(value, int):
        return value
    found = _BYTES_PATTERN.fullmatch(value)
    assert found is not None
    unit = found[3] or ""
    base = 1024 if unit.endswith("i") else 1000
    power = "KMGT".index(unit[0]) + 1 if unit else 0
    return int(float(found[1]) * base**power)


def _check_settings(name: str, value: Any) -> dict[str, Any]:
    """The settings in a pass's value (True and False have none), each checked."""
    if isinstance(value, bool):
        return {}
    known = _SETTINGS[name]
    if not isinstance(value, Mapping):
        settings = f" with settings {', '.join(known)}" if known else ""
        raise OptionError(f"option '{name}' must be True, False or a dict{settings}, got {_shown(value)}")
    _check_mapping(name, value, known)
    return dict(value)


def _check_mapping(name: str, value: Mapping[str, Any], known: Mapping[str, _Rule]) -> None:
    for setting, given in value.items():
        if setting not in known:
            raise OptionError(_unknown(f"setting of '{name}'", setting, known))
        _check_value(f"{name}.{setting}", given, known[setting])


def _check_value(key: str, value: Any, rule: _Rule) -> None:
    if not rule.check(value):
        raise OptionError(f"option '{key}' must be {rule.allowed}, got {_shown(value)}")


# ------------------------------------------------------------------ words


def _unknown(what: str, name: object, known: Iterable[str]) -> str:
    names = tuple(known)
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    hint = f"; did you mean '{near[0]}'?" if near else ""
    allowed = f"allowed: {', '.join(names)}" if names else "it has none"
    return f"unknown {what}: {name!r}{hint} ({allowed})"


def _not_built(key: str, value: object, quiet: str) -> OptionError:
    return OptionError(f"option '{key}' is not built yet, got {_shown(value)}; leave it out or give {quiet}")


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _written(record: Any) -> object:
    """A pass's record as a caller would write it: False, True, or its settings."""
    settings = asdict(record)
    if not settings.pop("enabled"):
        return False
    return settings or True
