"""What a disk may hold after a crash at any point of a workload, opened and checked, image by image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import crash_follower
import crash_workload
import pytest

from kvrep.testing.crash import (
    Image,
    Promises,
    RecorderUnavailable,
    Trace,
    build_recorder,
    images,
    record,
)
from kvrep.testing.crashcheck import check_images

SEED = 20261121
RECOVERIES = 3


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorder, built once."""
    try:
        return build_recorder(tmp_path_factory.mktemp("recorder"))
    except RecorderUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place for images: in memory where there is such a place, since thousands of files are written."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 1 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="kvrep-images-") as name:
        yield Path(name)


def traced(folder: Path, recorder: Path, *arguments: str) -> Trace:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    command = [sys.executable, crash_workload.__file__, str(root), *arguments]
    return record(command, root, recorder)


def promises(durability: str, states: tuple[str, ...] | None = None) -> Promises:
    options: dict[str, Any] = {**crash_workload.OPTIONS, "durability": durability}
    return Promises("store", states or crash_workload.states(), options)


@pytest.mark.parametrize(("durability", "at_least"), [("sync", 900), ("os", 900)])
def test_every_crash_keeps_the_promises(durability: str, at_least: int, folder: Path, recorder: Path) -> None:
    """Whatever a crash leaves opens without help and holds what was promised, wholly, and nothing else."""
    trace = traced(folder, recorder, durability)

    count, problems = check_images(
        images(trace, seed=SEED, samples=2), promises(durability), folder=folder / "images"
    )

    assert problems == [], "\n".join(map(str, problems))
    assert count >= at_least


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("durability", ["sync", "os"])
def test_many_more_crashes(durability: str, seed: int, folder: Path, recorder: Path) -> None:
    """The same with forty random choices at every event, drawn anew."""
    trace = traced(folder, recorder, durability)

    count, problems = check_images(
        images(trace, seed=seed, samples=40), promises(durability), folder=folder / "images"
    )

    assert problems == [], "\n".join(map(str, problems))
    assert count >= 1000


@pytest.mark.parametrize("durability", ["sync", "os"])
def test_a_crash_while_recovering_keeps_them_too(durability: str, folder: Path, recorder: Path) -> None:
    """The open after a crash may crash itself, anywhere; what it has shown once stays."""
    trace = traced(folder, recorder, durability)
    states = crash_workload.states()
    damaged = [i for i in images(trace, seed=SEED, samples=2) if i.what == "a random choice" and i.begun]
    count = 0
    for image in damaged[:: len(damaged) // RECOVERIES][:RECOVERIES]:
        shutil.rmtree(folder / "root")
        (folder / "root").mkdir()
        image.write(folder / "root")
        allowed = states[image.safe : image.begun + 1]
        again = traced(folder, recorder, durability, "recover", str(len(allowed)))
        shown = next(m for m in again.marks if m.startswith("states ")).split()[1:]
        assert shown[0] in allowed

        checked, problems = check_images(
            images(again, seed=SEED, samples=2, begun=len(allowed) - 1),
            promises(durability, (*allowed, *shown)),
            folder=folder / f"images-{image.number}",
        )

        assert problems == [], f"recovering from {image}:\n" + "\n".join(map(str, problems))
        count += checked
    assert count >= 25 * RECOVERIES


def images_of(what: str, folder: Path, recorder: Path, *, samples: int, fault: str = "") -> tuple[Any, Any]:
    """The images of a workload of ``crash_follower``, and the check for them."""
    root, scratch = folder / "root", folder / "scratch"
    root.mkdir()
    scratch.mkdir()
    crash_follower.PREPARE[what](root, scratch)
    kept = folder / "kept"
    shutil.copytree(scratch, kept, ignore=shutil.ignore_patterns("lock.mdb"))
    (root / "store" / "gen-000001" / "data" / "lock.mdb").unlink(missing_ok=True)
    command = [sys.executable, crash_follower.__file__, str(root), str(scratch), what, *filter(None, [fault])]
    trace = record(command, root, recorder, environment={"PYTHONPATH": os.pathsep.join(sys.path)})
    check = {
        "promise": crash_follower.CheckPromise(),
        "rejoin": crash_follower.CheckRejoin(str(kept)),
        "copy": crash_follower.CheckCopy(str(kept)),
    }[what]
    return images(trace, seed=SEED, samples=samples), check


@pytest.mark.parametrize(
    ("what", "samples", "at_least"),
    [
        ("promise", 2, 50),
        ("rejoin", 0, 80),
        ("copy", 0, 80),
        pytest.param("promise", 40, 60, marks=pytest.mark.prove),
        pytest.param("rejoin", 10, 130, marks=pytest.mark.prove),
        pytest.param("copy", 10, 350, marks=pytest.mark.prove),
    ],
)
def test_every_crash_of_a_follower_keeps_the_promises(
    what: str, samples: int, at_least: int, folder: Path, recorder: Path
) -> None:
    """Promises answered are kept, a log is cut only when what it held is saved, one whole copy is live."""
    made, check = images_of(what, folder, recorder, samples=samples)

    count, problems = check_images(made, check, folder=folder / "images")

    assert problems == [], "\n".join(map(str, problems))
    assert count >= at_least


@pytest.mark.parametrize("fault", crash_follower.FAULTS)
def test_images_of_a_follower_find_deliberate_faults(fault: str, folder: Path, recorder: Path) -> None:
    """A follower that forgets one of its syncs is caught, too."""
    made, check = images_of(crash_follower.FAULTS[fault][0], folder, recorder, samples=1, fault=fault)

    _, problems = check_images(made, check, folder=folder / "images", problems_max=1)

    assert problems


@pytest.mark.parametrize("fault", crash_workload.FAULTS)
def test_images_find_deliberate_faults(fault: str, folder: Path, recorder: Path) -> None:
    """A store that forgets one of its syncs is caught: so the images above do prove something."""
    durability = crash_workload.FAULTS[fault][0]
    trace = traced(folder, recorder, durability, fault)

    _, problems = check_images(
        images(trace, seed=SEED, samples=2), promises(durability), folder=folder / "images", problems_max=1
    )

    assert problems


def test_the_workload_does_what_it_shall(folder: Path) -> None:
    """It rolls and trims log files, and ends in the last of the states it foretells."""
    (folder / "root").mkdir()
    command = [sys.executable, crash_workload.__file__, str(folder / "root"), "sync"]
    subprocess.run(command, check=True, timeout=60)
    log_files = sorted(p.name for p in (folder / "root" / "store").glob("gen-*/log/*.log"))

    image = Image(0, 0, "kill", "the end", {}, (), begun=0, done=0, safe=0)
    last = len(crash_workload.states()) - 1

    wrong = promises("sync")(folder / "root", replace(image, begun=last, done=last))

    assert wrong is None
    assert log_files[0] > "0000000000000002.log"
