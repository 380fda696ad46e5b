"""What somebody else's service says of a sample: NSFW scores, hash matching, any model behind HTTP or in a package.

A batch of samples goes out, a record for each comes back in the same order,
and the named values of it become columns. Over HTTP that is

    POST URL   {"items": [{"uid": "...", "caption": "...", "sha256": "<hex>", "image": "<base64>"}, ...]}
    200        {"items": [{"nsfw": 0.02, "label": "safe"}, null, ...]}

and a function of the user's is called with the list of items (`image` as bytes)
and returns the list of records. A value that is missing or of another type than
the recipe says is null; NaN is an error of its sample, as of any signal. What a
service would say tomorrow is not known here: `revision` goes into the identity,
so a new one asks again.

What may pass by itself (no connection, a timeout, 429, 5xx, an exception in a
function) is tried again with doubled waits. A refusal of the content (400, 413,
422) is narrowed down by halving the batch to the sample that is refused.
Whatever else says no (401, 404, a redirect) is a mistake in the recipe and
stops the run. The store keeps what was unanswered as it keeps answers.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from curation.errors import UserError, one_line
from curation.hashing import file_hash
from curation.signals.fields import TYPES, Type, typed
from curation.signals.interface import Decoded
from curation.signals.transport import HttpService, Refused, Unanswered, reachable

Items = list[dict[str, Any]]
Answers = Sequence[Mapping[str, Any] | None]
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclass(frozen=True, kw_only=True)
class Service:
    """The `columns` as named, and NAME_unanswered (bool), true where no answer came.

    `url` or `function` ("package.module:function"): who is asked. The url is written into manifests, with its query.
    `columns`: {nsfw: float32, label: string}, of the types of signal `fields`.
    `send`: what an item holds, of uid, caption, sha256 (of the image's bytes), image (the bytes).
    `batch`: items of one question, at most 64. `timeout`: seconds until an answer; `retries`: tries after the first;
    `backoff`: seconds before the second try, doubled each time.
    `token_env`: name of an environment variable of the workers, sent as `token_header` ("Bearer ..." in Authorization).
    `on_failure`: "stop" ends the run when a question stays unanswered, "skip" leaves nulls and goes on.
    """

    columns: Mapping[str, Type]
    url: str | None = None
    function: str | None = None
    send: list[Literal["uid", "caption", "sha256", "image"]] = field(
        default_factory=lambda: ["uid", "caption", "sha256", "image"]
    )
    batch: int = 64
    timeout: float = 30.0
    retries: int = 4
    backoff: float = 1.0
    token_env: str | None = None
    token_header: str = "Authorization"
    on_failure: Literal["stop", "skip"] = "stop"
    revision: str = ""
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if (self.url is None) == (self.function is None):
            raise UserError("service: set exactly one of url and function")
        if not self.columns or not self.send:
            raise UserError("service: columns and send must name something; write columns: {nsfw: float32}")
        for name, least in (("batch", 1), ("retries", 0), ("backoff", 0), ("timeout", 0.001)):
            if not getattr(self, name) >= least:
                raise UserError(f"service: {name} {getattr(self, name)} is not at least {least}")
        if self.url is not None:
            shown = self.url.rpartition("@")[2]  # without credentials
            try:
                parts = urlsplit(self.url)
                host, _ = (parts.hostname or "").encode("idna"), parts.port  # these raise, and again where it is asked
            except ValueError as reason:
                raise UserError(f"service: url {shown!r}: {reason}; write https://host:8080/path") from None
            if parts.scheme not in ("http", "https") or not host:
                raise UserError(f"service: url {shown!r} is no address of HTTP; write https://host/path")
            if parts.username is not None or parts.password is not None:
                raise UserError(f"service: the url of {parts.hostname} holds credentials; name a variable in token_env")

    @property
    def reads(self) -> tuple[str, ...]:
        """What of a sample is sent."""
        of = {"caption": "caption", "sha256": "image", "image": "image"}
        return tuple({of[part] for part in self.send if part in of})

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {
            **{column: TYPES[kind][0] for column, kind in self.columns.items()},
            unanswered_column(name): pa.bool_(),
        }

    def content(self) -> dict[str, Any]:
        file = "" if self.function is None else _source(self.function)
        who = {"url": self.url, "function": self.function, "file": file}
        return {**who, "columns": dict(self.columns), "send": sorted(self.send), "revision": self.revision}

    def load(self, name: str) -> "ServiceMeter":
        """Raises: UserError: the function or the variable is not there, or nothing listens at the url."""
        if self.function is not None:
            return ServiceMeter(self, name, _function(self.function))
        assert self.url is not None
        token = None
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "").strip()
            if not token:
                raise UserError(f"service {name}: environment variable {self.token_env} is not set in the workers")
            if not (token.isascii() and token.isprintable()):
                raise UserError(f"service {name}: {self.token_env} holds what no HTTP header can; set it to the token")
        reachable(self.url, name, self.timeout)
        return ServiceMeter(self, name, HttpService(self.url, name, self.timeout, token, self.token_header))


def unanswered_column(name: str) -> str:
    """The column that says of each sample whether the service of this name gave no answer."""
    return f"{name}_unanswered"


class ServiceMeter:
    def __init__(self, settings: Service, name: str, ask: Callable[[Items], Answers]) -> None:
        self._settings, self._name, self._ask = settings, name, ask

    def see(self, sample: Decoded) -> dict[str, Any]:
        makes: dict[str, Callable[[], Any]] = {
            "uid": lambda: sample.uid,
            "caption": lambda: sample.caption,
            "sha256": lambda: hashlib.sha256(sample.raw).hexdigest(),
            "image": lambda: bytes(sample.raw),
        }
        return {part: makes[part]() for part in self._settings.send}

    def columns(self, seen: Sequence[dict[str, Any]]) -> dict[str, pa.Array]:
        answers: list[Mapping[str, Any] | None] = []
        for first in range(0, len(seen), self._settings.batch):
            answers += self._answers(list(seen[first : first + self._settings.batch]))
        out = {
            column: pa.array([_value(one, column, kind) for one in answers], TYPES[kind][0])
            for column, kind in self._settings.columns.items()
        }
        return {**out, unanswered_column(self._name): pa.array([one is None for one in answers], pa.bool_())}

    def _answers(self, items: Items) -> list[Mapping[str, Any] | None]:
        try:
            answers = self._patiently(items)
        except Refused as reason:
            if len(items) > 1:
                half = len(items) // 2
                return self._answers(items[:half]) + self._answers(items[half:])
            return self._failed(items, str(reason))
        except Unanswered as reason:
            return self._failed(items, str(reason))
        if len(answers) != len(items) or not all(one is None or isinstance(one, Mapping) for one in answers):
            return self._failed(items, f"its answer is no list of {len(items)} records")
        return answers

    def _patiently(self, items: Items) -> list[Mapping[str, Any] | None]:
        for attempt in range(self._settings.retries + 1):
            try:
                return list(self._ask(items))
            except Unanswered as reason:
                if attempt == self._settings.retries:
                    raise Unanswered(f"{reason}, {attempt + 1} tries") from None
                time.sleep(min(max(reason.wait, self._settings.backoff * 2**attempt), LONGEST_WAIT))
        raise AssertionError("the last try returns or raises")

    def _failed(self, items: Items, reason: str) -> list[Mapping[str, Any] | None]:
        if self._settings.on_failure == "stop":
            raise UserError(
                f"service {self._name}: {len(items)} samples without an answer ({reason}); "
                "mend the service and run again, or set on_failure: skip"
            )
        print(f"service {self._name}: {len(items)} samples unanswered: {reason}", file=sys.stderr)
        return [None] * len(items)


def _value(answer: Mapping[str, Any] | None, column: str, kind: Type) -> Any:
    value = None if answer is None else answer.get(column)
    return typed(value.item() if isinstance(value, np.generic) else value, kind)


def _function(path: str) -> Callable[[Items], Answers]:
    _source(path)
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise UserError(f"service: function {path}: the module has no such function; write package.module:function")

    @functools.wraps(function)
    def ask(items: Items) -> Answers:
        try:
            return list(function(items))
        except Exception as reason:  # whatever somebody else's code raises is an answer that did not come
            raise Unanswered(f"{type(reason).__name__}: {one_line(reason, None)}") from reason

    return ask


def _source(path: str) -> str:
    """The hash of the function's module."""
    module = path.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"service: function {path}: no module {module} to import; write package.module:function")
    return file_hash([Path(spec.origin)])
