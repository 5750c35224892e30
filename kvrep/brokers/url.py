"""Broker addresses: ``scheme://user:password@host:port,host:port/path?option=value``."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from kvrep.errors import ConfigurationMismatch, OpenError

__all__ = ["DEFAULT_TOPIC", "BrokerUrl", "is_broker_url"]

DEFAULT_TOPIC = "kvrep"
_URL_CHARS_MAX = 4096


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
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise OpenError(f"not a broker's address: {error}") from None
        if not parts.scheme or "://" not in text:
            raise OpenError(
                "not a broker's address: no scheme", hint='give "amqp://host/…" or "kafka://host/…"'
            )
        credentials, _, places = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        if len({name for name, _ in pairs}) != len(pairs):
            raise OpenError("an option stands twice in the broker's address")
        return cls(
            scheme=parts.scheme,
            hosts=tuple(_place(place) for place in places.split(",") if place),
            user=unquote(user),
            password=unquote(password),
            path=unquote(parts.path.removeprefix("/")),
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


def _place(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, "0"
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535) or not host:
        raise OpenError(f"not a host and port in a broker's address: {text[:300]!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _shown(host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host
