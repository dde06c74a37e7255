"""`decode`: the bytes of a request body become a typed request, or an error that says which field is wrong and why."""

from __future__ import annotations

import logging
import re
from typing import Any, TypeVar

import msgspec

from orcaserve.serve.errors import ApiError, body_too_complex, invalid, unsupported
from orcaserve.serve.tally import Tally

T = TypeVar("T", bound=msgspec.Struct)

_log = logging.getLogger("orcaserve.serve")
_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MOST_NAMES = 256

# Fields that would change the response, so that ignoring them would be a lie. Values that ask for nothing are fine.
_REFUSED: dict[str, str] = {
    "suffix": "text can only be continued at its end",
    "use_beam_search": "sample with 'n' instead",
    "functions": "offer them as 'tools'",
    "logits_processors": "requests cannot bring code",
    "chat_template": "the template comes from the model's folder only",
    "continue_final_message": "use /v1/completions to continue a text",
    "include_stop_str_in_output": "a stop string never appears in the text",
    "prompt_embeds": "send text or token ids",
    "audio": "this server generates text only",
}
_NOTHING = (b"null", b"false", b"[]", b"{}", b'""')


class UnknownFields:
    """Warns of each unknown field once. Owns the names that it has warned of, of which there is a limit."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def see(self, names: list[str]) -> None:
        for name in names:
            if name not in self._names and len(self._names) < _MOST_NAMES:
                self._names.add(name)
                _log.warning("requests use the unknown field %r; it is ignored", name[:64])


def decode(body: bytes, type: type[T], unknown: UnknownFields) -> T:
    """Raises ApiError (400)."""
    try:
        request = msgspec.json.decode(body, type=type)
        fields: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid("The request body is not valid JSON.", code="invalid_json") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.", code="invalid_json") from None
    known = frozenset(type.__struct_fields__)
    others = [name for name in fields if name not in known]
    for name in others:
        if name in _REFUSED and bytes(fields[name]) not in _NOTHING:
            raise unsupported(name, _REFUSED[name])
    unknown.see([name for name in others if name not in _REFUSED])
    return request


def decode_text(text: str, tally: Tally) -> Any:
    """What a string of a request is as JSON. tally: of all such strings of the request.

    Raises ValueError if it is not JSON, ApiError if there is too much to parse.
    """
    data = text.encode()
    tally.add(data)
    if tally.excess is not None:
        raise body_too_complex(*tally.excess)
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def explain(message: str) -> ApiError:
    """From msgspec's "Expected `float` <= 2.0 - at `$.temperature`"."""
    place = _PLACE.match(message)
    path = (place["path"] or "").removeprefix(".") if place else ""
    what = place["what"].replace(" | null", "").replace("`", "") if place else message
    what = what[:1].lower() + what[1:]
    if missing := re.fullmatch(r"object missing required field (\w+)", what):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return invalid(f"'{path}' is required.", path, "missing_required_parameter")
    if not path:
        return invalid(f"The request body is wrong: {what}.", code="invalid_value")
    path = path.replace("[...]", "")
    subject = f"a key of '{path}'" if place and place["key"] else f"'{path}'"
    return invalid(f"Invalid value for {subject}: {what}.", path, "invalid_value")
