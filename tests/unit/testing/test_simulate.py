"""The simulation of a whole cluster: clean seeds stay clean, planted faults are found, a seed repeats."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest

from kvrep.errors import ProtocolError
from kvrep.model.codec import RecordEncoder
from kvrep.model.record import Kind
from kvrep.replication.election import WhyGone
from kvrep.testing.simulate import PLANTS, run_seed
from kvrep.testing.simulate.clock import Clock, Time
from kvrep.testing.simulate.command import main, repeat
from kvrep.testing.simulate.disk import Disk
from kvrep.testing.simulate.faults import planted
from kvrep.testing.simulate.node import Node
from kvrep.testing.simulate.world import Settings, World

SEEDS = 300
SEEDS_PROVE = range(1_000_000, 1_020_000)
FOUND_WITHIN = 2000

FOUND_AT = {
    "ack-before-sync": 0,
    "commit-before-own-sync": 4,
    "apply-before-commit": 0,
    "show-before-commit": 0,
    "vote-not-persisted": 24,
    "promise-forgotten": 117,
    "stale-epoch-accepted": 66,
    "promise-to-two": 34,
    "shared-epochs": 265,
    "fence-too-few": 195,
    "no-fetch": 83,
    "no-checksum-at-join": 3,
    "log-not-cut": 3,
    "commit-by-counting": 0,
    "acks-of-non-voters": 3,
    "acks-counted-twice": 0,
    "old-rule-forgotten": 3,
    "configure-too-early": 11,
    "bound-ignored": 165,
    "lowered-in-silence": 121,
    "lowered-forgotten": 594,
    "empty-log-refused": 3,
    "founding-once-only": 23,
    "empty-voter-never-promises": 23,
}
"""Where the quick test begins to search. A change of the code may move a fault to another seed: then the test
only takes longer."""


HEALS = "the cluster heals"
STUCK = {"empty-log-refused", "founding-once-only", "empty-voter-never-promises"}
"""Faults that lose nothing, and stop everything. All others have to be found by what they break."""


def clean(seeds: range) -> None:
    """No seed of these breaks a promise, and they did real work."""
    acknowledged = epochs = 0
    for seed in seeds:
        outcome = run_seed(seed)
        assert not outcome.problem, f"{outcome.problem}\n{repeat(seed)}"
        acknowledged += outcome.acknowledged
        epochs += outcome.epochs
    assert acknowledged > 20 * len(seeds)
    assert epochs > 2 * len(seeds)


def find(plant: str, seeds: range) -> int:
    """The first of these seeds that finds the fault; the same seed without it is clean."""
    for seed in seeds:
        outcome = run_seed(seed, plant=plant)
        if outcome.problem and (outcome.rule == HEALS) == (plant in STUCK):
            assert outcome.rule != "nothing unexpected is raised", outcome.problem
            assert not run_seed(seed).problem
            return seed
    raise AssertionError(f"{plant} is not found in {seeds}")


@pytest.mark.parametrize("block", range(3))
def test_no_promise_is_broken(block: int) -> None:
    """Hundreds of clusters, each with its own troubles."""
    size = SEEDS // 3
    clean(range(block * size, (block + 1) * size))


@pytest.mark.parametrize("seed", [1_018_601])
def test_a_seed_that_was_found_stays_clean(seed: int) -> None:
    """1018601: a node that was frozen with its promises begins its epoch late, below one that has committed."""
    assert not run_seed(seed).problem


@pytest.mark.parametrize("plant", sorted(PLANTS))
def test_a_planted_fault_is_found(plant: str) -> None:
    """Each is found, as a rule at the seed where it was found before."""
    find(plant, range(FOUND_AT[plant], FOUND_AT[plant] + FOUND_WITHIN))


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_no_promise_is_broken_for_long() -> None:
    """Twenty thousand clusters."""
    clean(SEEDS_PROVE)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("plant", sorted(PLANTS))
def test_every_planted_fault_is_found_in_time(plant: str) -> None:
    """From the first seed on, within two thousand."""
    find(plant, range(FOUND_WITHIN))


def test_nothing_stays_planted() -> None:
    """What a fault changed is as it was, also after a run that failed; an unknown one is no fault."""
    for plant in PLANTS:
        with planted(plant):
            inside = {(where, name): where.__dict__[name] for where, name, _ in PLANTS[plant].changes()}
        for (where, name), changed in inside.items():
            assert where.__dict__[name] is not changed
    with pytest.raises(KeyError), planted("nothing like that"):
        pass


def told(seed: int) -> list[tuple[float, str, str]]:
    notes: list[tuple[float, str, str]] = []
    run_seed(seed, note=lambda *note: notes.append(note))
    return notes


def test_a_seed_repeats() -> None:
    """The same seed tells the same story, whether somebody listens or not; another seed another one."""
    assert told(5) == told(5) != told(6)
    assert run_seed(5) == run_seed(5, note=lambda *_: None)


def test_a_seed_repeats_in_another_process() -> None:
    """Nothing depends on how Python orders its sets."""
    outputs = {
        subprocess.run(
            [sys.executable, "-m", "kvrep.testing.simulate", "--seed", "17", "--trace"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert b"begins epoch" in outputs.pop()


# -- the command -----------------------------------------------------------------------------------


def test_many_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """It says how many, how fast, and that nothing was broken."""
    assert main(["--seeds", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 seeds" in said
    assert "a minute" in said
    assert "no promise was broken" in said


def test_a_failure_says_how_to_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    """What was broken, the last events, the exact command; it does the same again."""
    assert main(["--plant", "acks-counted-twice", "--seeds", "50"]) == 1
    said = capsys.readouterr().out
    assert "a commit has its copies" in said
    command = next(line for line in said.splitlines() if line.startswith("repeat it: "))
    arguments = command.partition("kvrep.testing.simulate ")[2].split()
    assert main(arguments) == 1
    again = capsys.readouterr().out
    assert command in again
    assert again.splitlines()[-2] == said.splitlines()[-2]


def test_going_on_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """With --keep-going every seed that fails is named."""
    assert main(["--plant", "ack-before-sync", "--seeds", "4", "--keep-going"]) == 1
    assert "4 seeds" in (said := capsys.readouterr().out)
    assert said.count("an ack tells the truth") >= 4


def test_the_list_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each."""
    assert main(["--list-plants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PLANTS)
    assert len(PLANTS) >= 10


@pytest.mark.parametrize(
    "arguments", [["--plant", "none-such"], ["--seeds", "0"], ["--seeds", "x"], ["--trace"], ["--seed", ""]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a reason."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """What it is, examples, exit codes."""
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert "exit code:" in said


def test_an_interrupt_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C: what was done is told, and the exit code says that it is not all."""
    calls = []

    def interrupted(seed: int, **_: object) -> object:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_seed(seed)

    monkeypatch.setattr("kvrep.testing.simulate.command.run_seed", interrupted)
    assert main(["--seeds", "10"]) == 130
    assert "2 seeds" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    """As with `head`: no traceback."""
    endless = ["--plant", "ack-before-sync", "--seeds", "100000000", "--keep-going"]
    command = [sys.executable, "-m", "kvrep.testing.simulate", *endless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        complaints = process.stderr.read()
        assert process.wait(60) == 130
    assert b"Traceback" not in complaints
    assert b"BrokenPipe" not in complaints


# -- the parts -------------------------------------------------------------------------------------


def logged(disk: Disk, count: int) -> None:
    for offset in range(disk.end + 1, disk.end + count + 1):
        payload = ["default", [b"k", b"%d" % offset]]
        data, _ = RecordEncoder().encode(offset, 1001, 0, Kind.WRITE, payload, disk.running)
        disk.append(data, offset - 1)


def test_a_crash_takes_only_what_was_not_synced() -> None:
    """Whatever the seed: a prefix stays, at least through what was synced, and it joins."""
    ends = set()
    for seed in range(60):
        disk = Disk()
        logged(disk, 4)
        disk.sync()
        logged(disk, 4)
        disk.lose_power(Random(seed))
        ends.add(disk.end)
        assert disk.recover() == disk.end - 1
        assert disk.synced == disk.end
        logged(disk, 1)
    assert ends == {4, 5, 6, 7, 8}


def test_a_failing_disk() -> None:
    """Full: nothing was written. EIO: nothing is safe, and nothing was promised."""
    disk = Disk()
    logged(disk, 1)
    disk.full = True
    with pytest.raises(OSError, match="space"):
        logged(disk, 1)
    disk.full, disk.eio = False, True
    for act in (disk.sync, lambda: disk.promise(2001, b"x")):
        with pytest.raises(OSError, match="error"):
            act()
    assert (disk.end, disk.synced, disk.promised) == (1, 0, 0)


def test_records_that_do_not_join_are_not_written() -> None:
    """The disk checks bytes with the real codec."""
    disk = Disk()
    logged(disk, 2)
    with pytest.raises(ProtocolError):
        disk.append(disk.entries[0].data, 0)


def test_clocks() -> None:
    """They run at their own speed, jump ahead, and the wall clock goes where it likes."""
    time = Time()
    clock = Clock(time, start=5.0, rate=2.0)
    time.step(101.5)
    assert clock.now == 8.0
    clock.jump(60.0)
    wall = clock.wall_us
    clock.jump_wall(-3600.0)
    assert clock.now == 68.0
    assert clock.wall_us == wall - 3_600_000_000
    assert clock.true_s(3.0) == 1.5


class Ear:
    """One end of a stream that only listens."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_message(self, message: object) -> None:
        self.heard.append(message)

    def on_end(self, why: WhyGone) -> None:
        self.heard.append(why)


def streamed(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[Ear, list[object]]:
    """A stream from b to a, as b hears it, and a list that gets the stream once a has it."""
    ear, got = Ear(), []
    monkeypatch.setattr(Node, "on_stream", lambda self, stream, hello: got.append(stream))
    for name in "ab":
        world.nodes[name].up = True
    world.network.open(world.nodes["b"], world.nodes["a"], ear, hello=None)  # type: ignore[arg-type]
    world.run(1.0)
    return ear, got


def test_a_stream_keeps_its_order_through_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What meets a one-way cut is late, not lost, and nothing overtakes it."""
    world = World(1, Settings(names="ab"))
    ear, (stream,) = streamed(world, monkeypatch)
    stream.accept(Ear())
    world.network.delay_s = 0.5
    world.cut("a", "b", both=False)
    for number in range(5):
        stream.to_follower(number)
        world.run(0.1)
    assert not ear.heard
    world.mend()
    stream.to_follower(5)
    stream.end_by_primary(broken=False)
    world.run(5.0)
    assert ear.heard == [0, 1, 2, 3, 4, 5, WhyGone.BROKEN]


def test_a_broken_stream_loses_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end hears of the end, and of nothing that had not arrived."""
    world = World(1, Settings(names="ab"))
    ear, (stream,) = streamed(world, monkeypatch)
    stream.accept(Ear())
    stream.to_follower("lost")
    stream.end_by_primary(broken=True)
    stream.to_follower("never sent")
    world.run(1.0)
    assert ear.heard == [WhyGone.BROKEN]


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead process refuses; one behind a cut says nothing."""
    world = World(1, Settings(names="ab"))
    a, b = world.nodes["a"], world.nodes["b"]
    b.up = True
    ear, deaf = Ear(), Ear()
    world.network.open(b, a, ear, hello=None)  # type: ignore[arg-type]
    world.run(1.0)
    world.isolate("a")
    world.network.open(b, a, deaf, hello=None)  # type: ignore[arg-type]
    world.run(1.0)
    assert ear.heard == [WhyGone.REFUSED]
    assert not deaf.heard


@pytest.mark.parametrize("twice", [0.0, 1.0])
def test_a_call_is_answered_once(twice: float) -> None:
    """However often it is carried out; and a deadline answers for a silent node."""
    world = World(1, Settings(names="ab"))
    a, b = world.nodes["a"], world.nodes["b"]
    a.up = b.up = True
    world.network.twice = twice
    served: list[int] = []
    answers: list[object] = []

    def serve(give: object) -> None:
        served.append(1)
        give("yes")  # type: ignore[operator]

    world.network.call(b, a, serve, answers.append, answers.append)
    world.run(1.0)
    assert answers == ["yes"]
    assert len(served) == 1 + int(twice)
    a.paused = True
    world.network.call(b, a, serve, answers.append, answers.append)
    world.run(1.0)
    assert answers[1:] == [WhyGone.SILENT]
