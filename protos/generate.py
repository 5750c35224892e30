"""Generate kvrep/_pb from protos/, or with --check say whether what is committed is fresh.

Run it as `make proto`, in the venv that holds the one protoc whose output every supported protobuf
runtime accepts. Only messages are generated: kvrep.transport registers gRPC methods by name, so no
generated file ties users to a version of grpcio.
"""

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parent
COMMITTED = SOURCES.parent / "kvrep" / "_pb"
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi")


def generate(out: Path) -> Path:
    """Run protoc over every source and return the folder that holds the generated package."""
    protos = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.proto"))
    if not protos:
        raise SystemExit(f"no .proto files below {SOURCES}")
    arguments = ["protoc", f"-I{SOURCES}", f"-I{WELL_KNOWN}"]
    arguments += [f"--python_out={out}", f"--pyi_out={out}", *protos]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    return out / "kvrep" / "_pb"


def names(folder: Path) -> set[str]:
    return {path.name for pattern in GENERATED for path in folder.glob(pattern)}


def differences(fresh: Path) -> list[str]:
    """Name every file that is missing, left over or different, with what is wrong about it."""
    wanted, found = names(fresh), names(COMMITTED)
    problems = [f"{name}: missing" for name in wanted - found]
    problems += [f"{name}: has no source in protos/" for name in found - wanted]
    problems += [
        f"{name}: differs from its source"
        for name in wanted & found
        if not filecmp.cmp(fresh / name, COMMITTED / name, shallow=False)
    ]
    return sorted(problems)


def install(fresh: Path) -> None:
    COMMITTED.mkdir(parents=True, exist_ok=True)
    for name in names(COMMITTED) - names(fresh):
        (COMMITTED / name).unlink()
    for name in names(fresh):
        shutil.copyfile(fresh / name, COMMITTED / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if not fresh")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        if not check:
            install(fresh)
            return 0
        problems = differences(fresh)
    for problem in problems:
        print(f"kvrep/_pb/{problem}", file=sys.stderr)
    if problems:
        print("run `make proto` and commit the result", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
