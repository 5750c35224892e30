"""The kvrep command: its arguments, and every subcommand on a store on disk."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import kvrep
from kvrep.cli import describe
from kvrep.cli.arguments import OPTION_FLAGS, acks, is_address, seconds, size
from kvrep.cli.console import Live, Progress, clip, duration, table
from kvrep.cli.exits import Exit, exit_code
from kvrep.cli.forms import pair_from_json, pair_to_json, visible
from kvrep.options import Options
from tests.cli_kit import Result, Served, command, pair, run_here, run_process

COMMANDS = ["demo", "serve", "status", "get", "put", "delete", "scan", "load", "dump", "verify"]
Kvrep = Callable[..., Result]


@pytest.fixture
def run(capfdbinary: Any) -> Kvrep:
    """Run the command in this process."""
    return lambda *arguments: run_here(capfdbinary, *arguments)


@pytest.fixture
def store(memory_path: Path) -> Path:
    """A closed store with a few pairs in two keyspaces."""
    with kvrep.open(memory_path / "store") as db:
        for i in range(10):
            db.put(b"key%d" % i, b"value%d" % i)
        db.put(b"bin\xff\x00\n", bytes(range(256)))
        db.keyspace("other").put(b"k", b"v")
    return memory_path / "store"


# -- arguments -------------------------------------------------------------------------------------


def test_help_names_every_command(run: Kvrep) -> None:
    """``kvrep --help`` lists all subcommands and the exit codes."""
    result = run("--help")
    assert result.code == 0
    for name in [*COMMANDS, "exit codes:"]:
        assert name in result.text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(run: Kvrep, name: str) -> None:
    """The help of each subcommand has examples of itself."""
    result = run(name, "--help")
    assert result.code == 0
    assert "example" in result.text
    assert f"kvrep {name}" in result.text.partition("example")[2]


def test_help_imports_little() -> None:
    """``kvrep --help`` and the help of a subcommand load neither gRPC nor the demo."""
    code = (
        "import sys, contextlib, io\n"
        "from kvrep.cli import main\n"
        "for arguments in (['--help'], ['get', '--help'], ['demo', '--help']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main(arguments)\n"
        "print([m for m in ('grpc', 'google', 'rich', 'kvrep.cli.demo.story') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(run: Kvrep) -> None:
    """``kvrep --version`` says the version of the package."""
    assert run("--version").text == f"kvrep {kvrep.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("get",), ("get", "x"), ("scan", "x", "--limit", "-1"), ("get", "x", "k", "--nope"),
     ("get", "x", "k", "--hex", "--base64"), ("serve", "x", "--memtable-bytes", "many"),
     ("serve", "x", "--acks", "some"), ("get", "x", "k", "--at-least", "7"),
     ("get", "x", "k", "--timeout", "0"), ("put", "x", "k"), ("verify", "a", "b"),
     ("put", "x", "k", "v", "--value-file", "f"),
     ("status", ".", "--watch", "1"), ("put", "127.0.0.1:1", "k", "v", "--create"),
     ("get", ".", "k", "--token-file", "t")],
)  # fmt: skip
def test_wrong_usage(run: Kvrep, arguments: tuple[str, ...]) -> None:
    """Arguments that make no sense end with 2 and words on stderr, and print nothing else."""
    result = run(*arguments)
    assert result.code == Exit.USAGE
    assert result.err
    assert not result.out


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("0", 0), ("65536", 65536), ("64KiB", 65536), ("64k", 65536), ("1.5GiB", 3 << 29), ("2 MB", 2 << 20)],
)
def test_sizes(text: str, bytes_: int) -> None:
    """Sizes are bytes, or numbers with a unit in powers of 1024."""
    assert size(text) == bytes_


@pytest.mark.parametrize("parse", [size, seconds, acks])
@pytest.mark.parametrize("text", ["", "x", "-1", "1e", "nan", "inf", "1 2"])
def test_values_that_are_none(parse: Callable[[str], object], text: str) -> None:
    """What is no size, time or ack rule is refused."""
    with pytest.raises(ArgumentTypeError):
        parse(text)


def test_every_option_is_a_flag() -> None:
    """``serve`` offers every field of Options, under its name, which ends with its unit."""
    elsewhere = {"name", "listen", "advertise", "follow", "voter", "create", "tls", "token", "coordinator"}
    elsewhere.add("forward_writes")
    flags = {flag.field: flag for group in OPTION_FLAGS.values() for flag in group}
    assert flags.keys() | elsewhere == {f.name for f in fields(Options)}
    for name, flag in flags.items():
        assert flag.names[0] == "--" + name.replace("_", "-")
        if flag.kind is seconds:
            assert name.endswith("_s")
        if flag.kind is size:
            assert name.endswith(("_bytes", "_bytes_max"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:7400", True), ("host:1", True), ("[::1]:7400", True), ("./a:1", False), ("orders", False),
     ("orders:x", False), (":1", False), ("a/b:1", False)],
)  # fmt: skip
def test_addresses_and_paths(text: str, expected: bool) -> None:
    """host:port with a numeric port is an address, all else is a path."""
    assert is_address(text) is expected


def test_an_existing_directory_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is named like an address is a path."""
    monkeypatch.chdir(tmp_path)
    assert is_address("store:7400")
    (tmp_path / "store:7400").mkdir()
    assert not is_address("store:7400")


def test_exit_codes_of_errors() -> None:
    """Each kind of error has the exit code that the help promises."""
    expected = {
        kvrep.NotPrimary("x"): 3, kvrep.NotEnoughFollowers("x"): 3, kvrep.KeyTooLong("x"): 3,
        kvrep.AckTimeout("x"): 4, kvrep.PeerUnavailable("x"): 5, kvrep.StoreInUse("x"): 5,
        kvrep.StaleRead("x"): 5, kvrep.Overloaded("x"): 5, kvrep.LogCorrupt("x"): 6,
        kvrep.StorageFailed("x"): 6, kvrep.NotAStore("x"): 2, kvrep.ConfigurationMismatch("x"): 2,
        kvrep.AuthenticationFailed("x"): 3,
        kvrep.ReplicationError("x"): 7, FileNotFoundError("x"): 2, RuntimeError("x"): 7,
    }  # fmt: skip
    assert {type(error).__name__: int(exit_code(error)) for error in expected} == {
        type(error).__name__: code for error, code in expected.items()
    }


def test_errors_are_one_line() -> None:
    """An error is described in one line, with its hint."""
    error = kvrep.NotPrimary("not\nhere", hint="there")
    assert describe(error) == "not here (there)"
    assert describe(kvrep.StoreInUse()).startswith("The store is already open. (")


# -- get, put, delete, scan ------------------------------------------------------------------------


def test_put_get_delete(run: Kvrep, store: Path) -> None:
    """A value that is put is got, byte for byte; once deleted it is missing, which is exit code 1."""
    put = run("put", store, "greeting", "hällo")
    assert put.code == 0
    assert kvrep.Position.parse(put.text.strip()).offset > 0
    assert run("get", store, "greeting") == Result(0, "hällo".encode(), "")
    assert run("delete", store, "greeting", "key0").code == 0
    missing = run("get", store, "greeting")
    assert (missing.code, missing.out) == (Exit.MISSING, b"")
    assert "greeting" in missing.err
    assert run("get", store, "key0").code == Exit.MISSING
    assert run("get", store, "key1").out == b"value1"


def test_binary_forms(run: Kvrep, store: Path) -> None:
    """Keys and values can be given and printed as hexadecimal and as base64."""
    key = b"bin\xff\x00\n".hex()
    assert run("get", store, key, "--hex").text.strip() == bytes(range(256)).hex()
    assert run("put", store, "AP8=", "AQI=", "--base64").code == 0
    assert run("get", store, "00ff", "--hex").text == "0102\n"
    assert run("get", store, "AP8=", "--base64").text == "AQI=\n"
    assert run("get", store, "0g", "--hex").code == Exit.USAGE
    assert run("get", store, "AP8", "--base64").code == Exit.USAGE


def test_value_from_file_and_stdin(
    run: Kvrep, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--value-file and - take the value byte for byte, behind flags, too."""
    data = random.Random(1).randbytes(100_000)
    (tmp_path / "value").write_bytes(data)
    assert run("put", store, "file", "--value-file", tmp_path / "value").code == 0
    assert run("get", store, "file").out == data
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data[::-1])))
    assert run("put", store, "stdin", "--keyspace", "other", "-").code == 0
    assert run("get", store, "stdin", "--keyspace", "other").out == data[::-1]
    assert run("put", store, "k", "--value-file", tmp_path / "nothing").code == Exit.USAGE


def test_scan_selects_and_orders(run: Kvrep, store: Path) -> None:
    """--prefix, --start, --stop, --reverse and --limit select as Store.scan does."""
    assert run("scan", store, "--prefix", "key", "--limit", "2").text == "key0\tvalue0\nkey1\tvalue1\n"
    assert run("scan", store, "--start", "key8", "--keys-only").text == "key8\nkey9\n"
    assert run("scan", store, "--stop", "key1", "--keys-only").text == "bin\\xff\\x00\\n\nkey0\n"
    assert run("scan", store, "--reverse", "--limit", "1", "--keys-only").text == "key9\n"
    assert run("scan", store, "--limit", "0").text == ""
    assert run("scan", store, "--keyspace", "other").text == "k\tv\n"
    assert run("scan", store, "--start", "x", "--stop", "b").text == ""


def test_scan_json_is_valid(run: Kvrep, store: Path) -> None:
    """Each line of scan --json is an object that load takes; bytes that are no text are base64."""
    lines = [json.loads(line) for line in run("scan", store, "--json").text.splitlines()]
    assert len(lines) == 11
    assert lines[0].keys() == {"key_base64", "value_base64"}
    assert lines[1] == {"key": "key0", "value": "value0"}


def test_create(run: Kvrep, tmp_path: Path) -> None:
    """A store is made only when asked to; a mistyped path is an error."""
    missing = run("put", tmp_path / "new", "k", "v")
    assert missing.code == Exit.USAGE
    assert "no store" in missing.err
    assert not (tmp_path / "new").exists()
    assert run("get", tmp_path / "new", "k").code == Exit.USAGE
    assert run("put", tmp_path / "new", "k", "v", "--create").code == 0
    assert run("get", tmp_path / "new", "k").out == b"v"


def test_refusals(run: Kvrep, store: Path) -> None:
    """What is outside the limits is refused with 3, and nothing is written."""
    assert run("put", store, "k" * 512, "v").code == Exit.REFUSED
    assert run("put", store, "", "v").code == Exit.REFUSED
    assert run("put", store, "k", "v", "--keyspace", "NOT ALLOWED").code == Exit.REFUSED
    assert run("get", store, "k").code == Exit.MISSING


def test_at_least(run: Kvrep, store: Path) -> None:
    """A position that a store on disk has is read at once; one that it has not is unavailable."""
    position = run("put", store, "k", "v").text.strip()
    assert run("get", store, "k", "--at-least", position).out == b"v"
    epoch, _, offset = position.partition(":")
    assert run("get", store, "k", "--at-least", f"{epoch}:{int(offset) + 9}").code == Exit.UNAVAILABLE
    assert run("scan", store, "--at-least", f"{int(epoch) + 1000}:{offset}").code == Exit.UNAVAILABLE


def test_store_in_use(run: Kvrep, store: Path) -> None:
    """A store that is open elsewhere is unavailable, and the error says what to do."""
    with kvrep.open(store):
        for arguments in (
            ("get", store, "k"),
            ("put", store, "k", "v"),
            ("status", store),
            ("verify", store),
        ):
            result = run(*arguments)
            assert result.code == Exit.UNAVAILABLE, arguments
            assert "already open" in result.err
            assert "Traceback" not in result.err


def test_a_member_of_a_group_is_read_and_not_written(run: Kvrep, memory_path: Path) -> None:
    """The stores of a group can be read on disk; writing there alone is refused, and begins no epoch."""
    with pair(memory_path) as (a, b):
        b.wait_for(a.put(b"k", b"v"))
        epoch = a.status().epoch
    for name in ("a", "b"):
        assert run("get", memory_path / name, "k").out == b"v"
        refused = run("put", memory_path / name, "k", "w")
        assert refused.code == Exit.REFUSED
        assert "group" in refused.err
        status = run("status", memory_path / name, "--json").json
        assert (status["role"], status["epoch"]) == ("offline", epoch)


def test_debug_shows_the_traceback(run: Kvrep, tmp_path: Path) -> None:
    """Errors are one line; with --debug, before or behind the subcommand, they are raised."""
    assert "Traceback" not in run("get", tmp_path, "k").err
    with pytest.raises(kvrep.NotAStore):
        run("--debug", "get", tmp_path, "k")
    with pytest.raises(kvrep.NotAStore):
        run("get", tmp_path, "k", "--debug")


def test_closed_pipe_is_no_error(memory_path: Path) -> None:
    """Whoever reads only the first lines gets no error from the command."""
    with kvrep.open(memory_path / "store") as db, db.batch() as batch:
        for i in range(20_000):
            batch.put(b"key%06d" % i, b"x" * 40)
    with subprocess.Popen(
        command("scan", memory_path / "store"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as scan:
        assert scan.stdout is not None
        assert scan.stderr is not None
        assert scan.stdout.readline().startswith(b"key000000")
        scan.stdout.close()
        assert scan.stderr.read() == b""
        assert scan.wait(30) == 0


# -- load and dump ---------------------------------------------------------------------------------


def contents(path: Path, keyspace: str = "default") -> dict[bytes, bytes]:
    with kvrep.open(path, create=False) as db:
        return dict(db.keyspace(keyspace).scan())


def make_tree(top: Path, count: int) -> dict[bytes, bytes]:
    """A directory with files of many sizes, one of them empty; returns what is in it."""
    chance = random.Random(2)
    expected: dict[bytes, bytes] = {}
    for i in range(count):
        path = top / f"d{i % 7}" / f"file {i} é.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = chance.randbytes(chance.choice([0, 1, 100, 5000, 40_000]))
        path.write_bytes(data)
        expected[os.fsencode(path.relative_to(top))] = data
    return expected


def test_load_and_dump_a_directory(run: Kvrep, memory_path: Path, tmp_path: Path) -> None:
    """Each file becomes a pair and each pair a file, byte for byte; loading twice changes nothing."""
    expected = make_tree(tmp_path / "source", 60)
    store = memory_path / "store"
    for _ in range(2):
        loaded = run("load", store, tmp_path / "source", "--create", "--batch-pairs", "7", "--quiet")
        assert (loaded.code, loaded.err) == (0, "")
        assert loaded.text.startswith("loaded 60 pairs")
    assert contents(store) == expected
    assert run("dump", store, str(tmp_path / "out") + "/").code == 0
    found = {
        os.fsencode(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*.bin")
    }
    assert found == expected


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
@pytest.mark.parametrize("flags", [(), ("--base64",)])
def test_dump_and_load_all(
    run: Kvrep, store: Path, tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    """A dump of all keyspaces, packed or not, loads into an equal store."""
    assert run("dump", store, "--all", *flags, tmp_path / name).code == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [name]
    assert run("load", tmp_path / "copy", tmp_path / name, "--create").code == 0
    for keyspace in ("default", "other"):
        assert contents(tmp_path / "copy", keyspace) == contents(store, keyspace)


def test_dump_to_stdout_and_prefix(run: Kvrep, store: Path) -> None:
    """Without a destination the lines go to standard output, and nothing else does."""
    result = run("dump", store, "--prefix", "key", "--quiet")
    assert [json.loads(line)["key"] for line in result.text.splitlines()] == [f"key{i}" for i in range(10)]
    assert result.err == ""


def test_load_from_stdin_with_base64_and_prefix(
    run: Kvrep, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines from standard input; --base64 says that all keys and values are, --prefix goes before keys."""
    lines = b'{"key": "AP8=", "value": "AQI="}\n\n{"keyspace": "third", "key": "AA==", "value": ""}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert run("load", store, "-", "--base64", "--prefix", "p/", "--keyspace", "second").code == 0
    assert contents(store, "second") == {b"p/\x00\xff": b"\x01\x02"}
    assert contents(store, "third") == {b"p/\x00": b""}


def test_the_last_of_equal_keys_wins(run: Kvrep, store: Path, tmp_path: Path) -> None:
    """Several puts of one key keep their order, although several writers share the load."""
    lines = [json.dumps({"key": f"k{i % 5}", "value": str(i)}) for i in range(2000)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    done = run(
        "load",
        store,
        tmp_path / "lines.jsonl",
        "--keyspace",
        "new",
        "--batch-pairs",
        "3",
        "--connections",
        "4",
    )
    assert done.code == 0
    assert contents(store, "new") == {b"k%d" % i: b"%d" % (1995 + i) for i in range(5)}


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", "{}", '{"key": "a"}', '{"key": 1, "value": "b"}', '{"key": "a", "value": null}',
     '{"key": "a", "value": "b", "ttl": "c"}', '{"key": "a", "key_base64": "YQ==", "value": "b"}',
     '{"key_base64": "!", "value": "b"}', '{"key": "\\ud800", "value": "b"}',
     '{"keyspace": 1, "key": "a", "value": "b"}'],
)  # fmt: skip
def test_lines_that_are_no_pairs(run: Kvrep, store: Path, tmp_path: Path, line: str) -> None:
    """A line that is no pair ends the load with 2 and says which line it is."""
    (tmp_path / "bad.jsonl").write_text('{"key": "good", "value": "1"}\n' + line + "\n")
    result = run("load", store, tmp_path / "bad.jsonl")
    assert result.code == Exit.USAGE
    assert "bad.jsonl, line 2: " in result.err


def test_damaged_gzip(run: Kvrep, store: Path, tmp_path: Path) -> None:
    """A packed file that breaks off, or is none, is an error, not a short load."""
    whole = gzip.compress(b'{"key": "a", "value": "b"}\n' * 1000)
    for name, data in (("cut.gz", whole[:-20]), ("plain.gz", b'{"key": "a", "value": "b"}\n')):
        (tmp_path / name).write_bytes(data)
        assert run("load", store, tmp_path / name).code == Exit.USAGE


@pytest.mark.parametrize("key", [b"../out", b"/etc/x", b"a//b", b"a/./b", b"..", b"a\x00b", b"x" * 300])
def test_keys_that_are_no_paths(run: Kvrep, memory_path: Path, tmp_path: Path, key: bytes) -> None:
    """A dump into a directory never leaves it: a key that cannot be a file below it is an error."""
    with kvrep.open(memory_path / "store") as db:
        db.put(key, b"v")
    before = sorted(tmp_path.rglob("*"))
    result = run("dump", memory_path / "store", str(tmp_path / "in" / "out") + "/")
    assert result.code == Exit.USAGE
    assert "cannot be a file" in result.err
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.is_file()] == []


def test_keys_that_collide_as_paths(run: Kvrep, memory_path: Path, tmp_path: Path) -> None:
    """The keys 'a' and 'a/b' cannot both be files."""
    with kvrep.open(memory_path / "store") as db:
        db.put(b"a", b"1")
        db.put(b"a/b", b"2")
    result = run("dump", memory_path / "store", str(tmp_path / "out") + "/")
    assert result.code == Exit.USAGE
    assert "a/b" in result.err


def test_failed_dump_leaves_no_file(run: Kvrep, store: Path, tmp_path: Path) -> None:
    """Of a dump that fails nothing is left, and what was there stays."""
    (tmp_path / "old.jsonl").write_text("old")
    result = run("dump", store, tmp_path / "old.jsonl", "--at-least", "9999:9999")
    assert result.code == Exit.UNAVAILABLE
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["old.jsonl"]
    assert (tmp_path / "old.jsonl").read_text() == "old"


def test_pairs_as_json_round_trip() -> None:
    """Any key and value survive the way through a JSON line."""
    chance = random.Random(3)
    for _ in range(500):
        key, value = chance.randbytes(chance.randint(1, 5)), chance.randbytes(chance.randint(0, 5))
        assert pair_from_json(pair_to_json(key, value)) == (None, key, value)
        line = pair_to_json(key, value, keyspace="k", always_base64=True)
        assert pair_from_json(line) == ("k", key, value)


# -- status ----------------------------------------------------------------------------------------


def test_status_of_a_store_on_disk(run: Kvrep, store: Path) -> None:
    """Status reads a closed store; --json is one object with all fields of Status."""
    text = run("status", store).text
    assert "offline" in text
    assert "no process has it open" in text
    status = run("status", store, "--json").json
    assert status.keys() == {f.name for f in fields(kvrep.Status)}
    assert status["applied_offset"] == status["last_offset"] > 10


# -- serve -----------------------------------------------------------------------------------------


def test_serve_ends_in_order(memory_path: Path) -> None:
    """It says when it is ready; SIGTERM ends it with 0 and SIGINT with 130, closed cleanly and quietly."""
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with Served(memory_path / "store", "--name", "solo", "--log-level", "warning") as served:
            assert served.ready["role"] == "primary"
            assert served.ready["pid"] == served.process.pid
            assert served.ready["address"].startswith("127.0.0.1:")
            assert run_process("put", served.address, "k", str(number)).code == 0
            assert served.end(number) == (code, "")
        assert run_process("get", memory_path / "store", "k").out == b"%d" % number


def test_serve_ends_with_its_parent(memory_path: Path) -> None:
    """With --until-stdin-closes it ends when whoever started it is gone."""
    with Served(memory_path / "store") as served:
        out, err = served.process.communicate(timeout=30)
        assert served.process.returncode == 0
        assert out == b""
        assert "Traceback" not in err.decode()


def test_serve_passes_its_options_on(memory_path: Path) -> None:
    """Flags become options: status shows the commit rule, the durability and the name."""
    flags = (
        "--name",
        "n",
        "--acks",
        "majority",
        "--ack-timeout",
        "1.5",
        "--durability",
        "os",
        "--memtable-bytes",
        "1MiB",
    )
    with Served(memory_path / "store", *flags) as served:
        status = run_process("status", served.address, "--json").json
        assert (status["name"], status["acks"], status["ack_timeout_s"]) == ("n", "majority", 1.5)
        assert status["durability"] == "os"


def test_serve_that_cannot_start(run: Kvrep, store: Path, tmp_path: Path) -> None:
    """What stops the start is one line and exit code 2; a store that is open already is 5."""
    occupied = tmp_path / "file"
    occupied.write_text("x")
    assert run("serve", occupied, "--listen", "127.0.0.1:0").code == Exit.USAGE
    assert run("serve", tmp_path / "none", "--no-create", "--listen", "127.0.0.1:0").code == Exit.USAGE
    assert run("serve", store, "--listen", "nonsense").code != 0
    assert run("serve", store, "--listen", "127.0.0.1:0", "--heartbeat-timeout-s", "0.1").code == Exit.USAGE
    with kvrep.open(store, listen="127.0.0.1:0") as db:
        assert run("serve", store, "--listen", "127.0.0.1:0").code == Exit.UNAVAILABLE
        taken = run("serve", tmp_path / "other", "--listen", db.address)
        assert taken.code == Exit.USAGE
        assert db.address in taken.err


# -- Ctrl-C ----------------------------------------------------------------------------------------


def test_interrupt_ends_a_watch(memory_path: Path) -> None:
    """Ctrl-C ends a command that would go on for ever with 130 and without a traceback."""
    with kvrep.open(memory_path / "store", listen="127.0.0.1:0") as db:
        with subprocess.Popen(
            command("status", db.address, "--watch", "0.05", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as watch:
            assert watch.stdout is not None
            assert watch.stderr is not None
            for _ in range(3):
                assert json.loads(watch.stdout.readline())["role"] == "primary"
            watch.send_signal(signal.SIGINT)
            watch.stdout.read()
            assert watch.stderr.read() == b"interrupted\n"
            assert watch.wait(30) == Exit.INTERRUPTED


# -- what people see -------------------------------------------------------------------------------


def test_visible_bytes() -> None:
    """Any bytes become one line of text; text stays as it is."""
    assert visible("grün".encode()) == "grün"
    assert visible(b"a\tb\nc\x1b[31m\xff\\") == "a\\tb\\nc\\x1b[31m\\xff\\\\"


def test_tables_are_aligned() -> None:
    """Columns are as wide as their widest cell, numbers to the right."""
    assert table(("a", "n"), [("xyz", "1"), ("x", "100")], right=(1,)) == ["a      n", "xyz    1", "x    100"]


def test_durations() -> None:
    """Times are said in the unit people would use."""
    assert [duration(s) for s in (None, 0, 0.0012, 2.41, 125, 7500)] == [
        "-", "0 ms", "1.2 ms", "2.4 s", "2 min 5 s", "2 h 5 min",
    ]  # fmt: skip


def test_clipping_keeps_escape_codes() -> None:
    """A line is cut at its visible width, and its colour ends there."""
    assert clip("abcdef", 4) == "abcd"
    assert clip("\x1b[31mabcdef\x1b[0m", 4) == "\x1b[31mabcd\x1b[0m"
    assert clip("abc", 4) == "abc"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_block_redraws_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the block is drawn over itself, lines that stay go above it, and it goes at the end."""
    monkeypatch.setenv("TERM", "xterm")
    out = _Terminal()
    with Live(lambda: ["one", "two"], lambda: "plain", stream=out) as live:
        live.tick()
        assert out.getvalue() == "one\x1b[K\ntwo\x1b[K\n\x1b[J"
        live.say("stays")
        assert "\x1b[2F\x1b[Jstays\n" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2F\x1b[J")
    assert "plain" not in out.getvalue()


def test_live_block_is_plain_elsewhere() -> None:
    """Without a terminal there is a line now and then, and no escape code."""
    out = io.StringIO()
    with Live(lambda: ["block"], lambda: "plain", stream=out, plain_interval_s=0.0) as live:
        live.tick()
        live.say("stays")
    assert out.getvalue() == "plain\nstays\n"


def test_progress_says_rate_and_rest(capsys: pytest.CaptureFixture[str]) -> None:
    """The progress line has what is done, its share, the rate and the time that is left."""
    with Progress("loaded", 4_000_000, interval_s=0.0) as progress:
        progress.add(1_000_000, 10)
    line = capsys.readouterr().err.strip()
    assert line.startswith("loaded: 10 pairs, 1.0 MB (25%), ")
    assert "/s, " in line
    assert line.endswith(" left")
