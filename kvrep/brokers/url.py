"""Broker addresses: ``scheme://user:password@host:port,host:port/path?option=value``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote

from kvrep.errors import ConfigurationMismatch, OpenError

__all__ = ["DEFAULT_TOPIC", "BrokerUrl", "is_broker_url"]

DEFAULT_TOPIC = "kvrep"
_URL_CHARS_MAX = 4096
# RFC 3986, appendix B; ``urlsplit`` of some Python versions refuses lists of hosts.
_PARTS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<places>[^/?#]*)(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?",
    re.IGNORECASE,
)
_PLACE = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.%]+)\]|(?P<host>[^][:]+))(?::(?P<port>[0-9]{1,5}))?")


def is_broker_url(text: object) -> bool:
    """Whether this is meant for a broker, not for a node (``host:port``)."""
    return isinstance(text, str) and "://" in text


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """The parts of an address; ``str()`` hides the password."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    """(host, port); port 0 stands for the broker's usual one."""
    user: str = ""
    password: str = field(default="", repr=False)
    path: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> BrokerUrl:
        """Read an address; ``OpenError`` that says what is wrong, without showing a password."""
        if not isinstance(text, str):
            raise TypeError(f"a broker's address is text, not {type(text).__name__}")
        if len(text) > _URL_CHARS_MAX:
            raise OpenError(f"a broker's address has at most {_URL_CHARS_MAX} characters")
        parts = _PARTS.fullmatch(text)
        if parts is None:
            raise OpenError("not a broker's address", hint='give "amqp://host/…" or "kafka://host/…"')
        credentials, _, places = parts["places"].rpartition("@")
        user, _, password = credentials.partition(":")
        pairs = parse_qsl(parts["query"] or "", keep_blank_values=True)
        if len({name for name, _ in pairs}) != len(pairs):
            raise OpenError("an option stands twice in the broker's address")
        return cls(
            scheme=parts["scheme"].lower(),
            hosts=tuple(_place(place) for place in places.split(",") if place),
            user=unquote(user),
            password=unquote(password),
            path=unquote((parts["path"] or "").removeprefix("/")),
            options=dict(pairs),
        )

    def __str__(self) -> str:
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        places = ",".join(_shown(host, port) for host, port in self.hosts)
        options = "&".join(f"{name}={quote(value, safe='')}" for name, value in self.options.items())
        path = f"/{quote(self.path)}" if self.path else ""
        return f"{self.scheme}://{user}{places}{path}{'?' if options else ''}{options}"

    def only(self, *known: str) -> None:
        """``ConfigurationMismatch`` when the address has an option that this broker does not know."""
        for name in self.options:
            if name not in known:
                raise ConfigurationMismatch(
                    f"{self.scheme}:// has no option {name!r}",
                    hint=f"known are: {', '.join(sorted(known))}",
                    option=name,
                    given=self.options[name],
                )

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """Option ``name`` as a whole number; ``ConfigurationMismatch`` unless it is one from low to high."""
        text = self.options.get(name)
        if text is None:
            return default
        if not text.isdecimal() or not low <= int(text) <= high:
            raise self._refused(name, f"a whole number from {low} to {high}")
        return int(text)

    def choice(self, name: str, *allowed: str) -> str:
        """Option ``name``, whatever its case; the first of ``allowed`` where it is not given.

        ``ConfigurationMismatch`` when it is none of them.
        """
        text = self.options.get(name, allowed[0])
        for one in allowed:
            if one.lower() == text.lower():
                return one
        raise self._refused(name, " or ".join(allowed))

    def _refused(self, name: str, wanted: str) -> ConfigurationMismatch:
        given = self.options[name]
        return ConfigurationMismatch(
            f"{name}={given[:300]!r} is not allowed: {wanted}", option=name, given=given
        )


def _place(text: str) -> tuple[str, int]:
    match = _PLACE.fullmatch(text)
    if match is None or int(match["port"] or 0) > 65535:
        raise OpenError(f"not a host and port in a broker's address: {text[:300]!r}")
    return match["v6"] or match["host"], int(match["port"] or 0)


def _shown(host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host
