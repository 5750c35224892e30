"""The soak: it runs, it finds what is planted, it tells what it did, and it leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvrep import Position
from kvrep.errors import PeerUnavailable
from kvrep.testing.checkers import Violation
from kvrep.testing.embedded import EmbeddedNode
from kvrep.testing.namespaces import NotPrivileged, why_not
from kvrep.testing.soak.__main__ import main
from kvrep.testing.soak.faults import KINDS, FaultSpan, available
from kvrep.testing.soak.load import Generation, token_of, valued
from kvrep.testing.soak.picture import COLOURS, picture
from kvrep.testing.soak.report import bars, clock, progress_line, text
from kvrep.testing.soak.run import Progress, Result, Settings, soak
from kvrep.testing.soak.watch import NodeSample, Sample, disk_of, grown, growth

MIB = 1 << 20


def settings(**more: Any) -> Settings:
    return Settings(**{"seconds": 5.0, "seed": 1, "base_keys": 300, "sample_s": 0.25, **more})


# -- whole ones ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty seconds of faults: everything is in order, and the report and the picture tell of it."""
    status = main(["--minutes", "0.33", "--seed", "5", "--report", str(tmp_path / "out")])
    said = capsys.readouterr()

    assert status == 0, said.out
    assert "every promise was kept" in said.out
    assert "seed 5" in said.err
    assert (tmp_path / "out" / "soak.txt").read_text() == said.out
    drawing = (tmp_path / "out" / "soak.svg").read_text()
    assert drawing.count('class="fault"') >= 3
    assert "the primary" in drawing


def test_ctrl_c_ends_it_with_a_report(tmp_path: Path) -> None:
    """Ctrl-C mends, checks, reports and exits with 130; no process and no folder is left."""
    command = [sys.executable, "-m", "kvrep.testing.soak", "--minutes", "1.5", "--faults", "pause,kill"]
    process = subprocess.Popen(
        [*command, "--report", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("writes/s" in line and " 0 writes/s" not in line for line in lines)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 130, out
    assert "interrupted; every promise was kept so far" in out
    assert {path.name for path in tmp_path.iterdir()} == {"soak.txt", "soak.svg", "soak.log"}
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_it_finds_writes_that_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that acknowledge a put now and then without making it are found out."""
    real, chance, last = EmbeddedNode.put, random.Random(3), [Position(1001, 1)]

    def put(self: EmbeddedNode, key: bytes, value: bytes, **options: Any) -> Position:
        if b"key/" not in key or chance.random() > 0.05:
            last[0] = real(self, key, value, **options)
        return last[0]

    monkeypatch.setattr(EmbeddedNode, "put", put)
    result = soak(settings(faults=("throttle",)), tmp_path, threading.Event())

    assert not result.ok
    assert {"linearizability", "acknowledged loss"} & {v.check for v in result.violations}
    assert "VIOLATIONS" in text(result)


@pytest.mark.slow
def test_it_finds_values_that_change_and_processes_that_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that shows what nobody wrote, half a batch, an old key that is gone, a node that crashes."""
    real_get, real_ask, chance = EmbeddedNode.get, EmbeddedNode.ask, random.Random(4)
    pids: set[int] = set()

    def get(self: EmbeddedNode, key: bytes, default: Any = None, **options: Any) -> Any:
        value = real_get(self, key, default, **options)
        return value[:-1] + b"!" if value and chance.random() < 0.02 else value

    def ask(self: EmbeddedNode, do: str, *arguments: Any, **more: Any) -> Any:
        answer = real_ask(self, do, *arguments, **more)
        if do == "scan" and len(answer) == 2 and chance.random() < 0.05:
            return answer[:1]
        if do == "content":
            return [entry for entry in answer if entry[1] != b"base/000007"]
        if do == "get" and self.name == "c" and not pids:
            pids.add(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return answer

    monkeypatch.setattr(EmbeddedNode, "get", get)
    monkeypatch.setattr(EmbeddedNode, "ask", ask)
    result = soak(settings(faults=("throttle",)), tmp_path, threading.Event())

    found = {v.check for v in result.violations}
    assert {"values", "batches", "content", "nodes"} <= found
    assert any("ended by itself" in v.message for v in result.violations)


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["proxy", "namespaces"])
def test_five_minutes(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every fault there is for five minutes, joined by the proxy, and in namespaces with disks that fill up."""
    if where == "namespaces" and (reason := why_not()):
        pytest.skip(reason)
    given = request.config.getoption("--kvrep-seed")
    arguments = ["--minutes", "5", "--report", str(tmp_path)]
    arguments += [] if given is None else ["--seed", str(given)]
    arguments += ["--namespaces", "--disk-mib", "96"] if where == "namespaces" else []

    assert main(arguments) == 0, (tmp_path / "soak.txt").read_text()


# -- parts -----------------------------------------------------------------------------------------


def test_values_prove_themselves() -> None:
    """What was written is recognised at every size; anything else is not."""
    for size in (0, 1, 20, 500):
        assert token_of(valued(b"client1-17", size)) == b"client1-17"
    assert token_of(None) is None
    good = valued(b"client1-17", 100)
    for wrong in (b"", b" ", good[:-1] + b"x", good[1:], b"client1-18" + good[10:], good + b"1"):
        with pytest.raises(ValueError, match="nobody wrote"):
            token_of(wrong)


def test_a_generation_ends_when_nobody_uses_it() -> None:
    """Calls that begin after the end come too late; those before are waited for."""
    generation = Generation(1)
    with generation.used() as first:
        generation.end()
        with generation.used() as second:
            assert (first, second) == (True, False)
        assert not generation.idle
    assert generation.idle


def samples(memory: list[int], *, every_s: float = 10.0) -> list[Sample]:
    found = []
    for i, value in enumerate(memory):
        first = NodeSample("primary", value, 20, 30, 5 * MIB, 0)
        second = NodeSample("follower", 30 * MIB, 20, 30, 5 * MIB, i)
        found.append(Sample(i * every_s, i * 100, i * 40, {"a": first, "b": second}))
    return found


def test_growth_is_found() -> None:
    """A node whose memory climbs is found, one that warms up or jumps is not, and a short run is not judged."""
    climbing = samples([(30 + 4 * i) * MIB for i in range(60)])
    warming = samples([min(30 + 20 * i, 90) * MIB for i in range(60)])
    jumping = samples([(200 if i % 7 == 0 else 30) * MIB for i in range(60)])

    assert [v.message.split(" went")[0] for v in grown(climbing)] == ["memory of a"]
    assert grown(warming) == grown(jumping) == []
    assert grown(samples([(30 + 400 * i) * MIB for i in range(60)], every_s=1.0)) == []
    assert not any(g.judged for g in growth(samples([1, 2], every_s=1.0)))
    assert growth([]) == []


def test_disk_of_a_folder(tmp_path: Path) -> None:
    """What is allocated counts, holes do not."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(os.urandom(MIB))
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(64 * MIB)

    assert MIB <= disk_of(tmp_path) < 2 * MIB
    assert disk_of(tmp_path / "none") == 0


def test_what_is_not_possible_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of fault is possible or has a reason; a kind that was not asked for has none."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    kinds, left_out = available(list(KINDS), namespaces=True, disks=False)
    assert {k.name for k in kinds} | left_out.keys() == KINDS.keys()
    assert left_out.keys() == {"delay", "corrupt", "slow-disk", "full-disk"}
    kinds, left_out = available(["kill", "wall"], namespaces=False, disks=True)
    assert ([k.name for k in kinds], left_out) == (["kill"], {"wall": "needs --namespaces"})
    assert KINDS.keys() == COLOURS.keys()


def result(**more: Any) -> Result:
    spans = [
        FaultSpan("pause", "a", True, 30.0, 33.0, 33.4, 1.25),
        FaultSpan("full-disk", "b", False, 100.0, 180.0, 180.1),
        FaultSpan("kill", "a", True, 400.0, 0.0, 0.0),
    ]
    made = Result(
        settings=settings(seconds=600.0), took_s=600.0, samples=samples([30 * MIB] * 61), spans=spans,
        counts=Counter(acknowledged=6000, read=2400), checked=8400, epochs=2, left_out={"wall": "because"},
    )  # fmt: skip
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_the_text(tmp_path: Path) -> None:
    """The verdict stands first; faults, growth and violations follow."""
    good = text(result())
    bad = text(result(violations=[Violation("values", "key lost")] * 30, timeline="0.1 s a starts"))

    assert good.startswith("kvrep soak: every promise was kept\n")
    for part in (
        "6,000 writes acknowledged",
        "seed 1",
        "pause",
        "left out: because",
        "steady",
        "no violations",
    ):
        assert part in good
    assert bad.startswith("kvrep soak: 30 VIOLATIONS")
    assert "… and 10 more" in bad
    assert bad.endswith("a starts\n")
    assert "so far" in text(result(interrupted=True))
    assert text(Result(settings=settings())).startswith("kvrep soak")


@pytest.mark.parametrize("made", [result(), result(samples=[], spans=[], violations=[Violation("a", "<b>")])])
def test_the_picture(made: Result) -> None:
    """It is well-formed, needs nothing from outside, and shows every node, fault and role."""
    drawn = picture(made)
    root = ElementTree.fromstring(drawn)

    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not any(word in drawn for word in ("href", "url(", "@import", "<script", "<image"))
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    if made.spans:
        assert any(
            t.startswith("pause of a, the primary: 00:30 for 3.0 s; 1.25 s without a write") for t in titles
        )
        assert any(t.startswith("a: primary") for t in titles)
    numbers = [
        float(v) for e in root.iter() for k, v in e.attrib.items() if k in ("x", "y", "width", "height")
    ]
    assert all(number >= 0 for number in numbers)


def test_small_forms() -> None:
    """Times, bars and the line for the terminal."""
    assert [clock(s) for s in (0, 61.9, 3600)] == ["00:00", "01:01", "1:00:00"]
    assert bars([0, 1, 8, 4]) == " ▁█▄"
    assert bars([]) == bars([0.0])[:0] == ""
    progress = Progress(61.0, 600.0, [0.0, 200.0], "b", 3, "pause a", 0, "runs")
    assert progress_line(progress).split("  ")[0] == "01:01 / 10:00"
    assert progress_line(progress).endswith("3 faults  pause a")
    assert "2 VIOLATIONS" in progress_line(Progress(1.0, 2.0, [], "", 0, "", 2, "checks"))


@pytest.mark.parametrize(
    "arguments",
    ["--minutes 0", "--minutes x", "--seed -1", "--nodes 2", "--clients 0", "--faults rain", "--faults ,",
     "--disk-mib 8", "--rate inf"],
)  # fmt: skip
def test_wrong_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What makes no sense is refused at once, with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert arguments.split(maxsplit=1)[0] in capsys.readouterr().err


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Every fault, every exit status and some examples are in it."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"  {name} " in said for name in KINDS)
    assert all(f"\n  {status} " in said or f"  {status} " in said for status in (0, 1, 3, 130))
    assert said.count("python -m kvrep.testing.soak") >= 5


def test_stores_of_a_broken_promise_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After violations the exit status is 1 and the stores are left for a look; else they are removed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for violations, status, left in (([], 0, 0), ([Violation("values", "lost")], 1, 1)):
        made = result(violations=violations)
        monkeypatch.setattr("kvrep.testing.soak.__main__.soak", lambda *given, made=made: made)
        assert main(["--minutes", "1"]) == status
        assert len(list(tmp_path.iterdir())) == left
    assert f"kept in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [NotPrivileged("namespaces need root"), PeerUnavailable("x", address="")])
def test_what_keeps_it_from_running(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A soak that cannot run says why, and exits with 3."""

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr("kvrep.testing.soak.__main__.soak", refuse)
    assert main(["--minutes", "1"]) == 3
    assert str(error) in capsys.readouterr().err
