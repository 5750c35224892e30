from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Position(_message.Message):
    __slots__ = ("epoch", "offset")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    offset: int
    def __init__(self, epoch: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class EpochTable(_message.Message):
    __slots__ = ("epochs", "firsts")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    firsts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epochs: _Optional[_Iterable[int]] = ..., firsts: _Optional[_Iterable[int]] = ...) -> None: ...

class FromFollower(_message.Message):
    __slots__ = ("hello", "promise", "credit")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROMISE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    promise: Promise
    credit: Credit
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., promise: _Optional[_Union[Promise, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ...) -> None: ...

class FromPrimary(_message.Message):
    __slots__ = ("welcome", "truncate", "need_bootstrap", "refused", "fence", "heartbeat")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    NEED_BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    truncate: Truncate
    need_bootstrap: NeedBootstrap
    refused: Refused
    fence: Fence
    heartbeat: Heartbeat
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., truncate: _Optional[_Union[Truncate, _Mapping]] = ..., need_bootstrap: _Optional[_Union[NeedBootstrap, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., fence: _Optional[_Union[Fence, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("store_id", "name", "lineage", "branch", "protocol_min", "protocol_max", "features", "voter", "address", "promised_epoch", "last", "running", "applied", "committed", "epochs", "credit_bytes", "durability")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    VOTER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROMISED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    store_id: bytes
    name: str
    lineage: bytes
    branch: bytes
    protocol_min: int
    protocol_max: int
    features: _containers.RepeatedScalarFieldContainer[str]
    voter: bool
    address: str
    promised_epoch: int
    last: Position
    running: int
    applied: int
    committed: int
    epochs: EpochTable
    credit_bytes: int
    durability: str
    def __init__(self, store_id: _Optional[bytes] = ..., name: _Optional[str] = ..., lineage: _Optional[bytes] = ..., branch: _Optional[bytes] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., voter: bool = ..., address: _Optional[str] = ..., promised_epoch: _Optional[int] = ..., last: _Optional[_Union[Position, _Mapping]] = ..., running: _Optional[int] = ..., applied: _Optional[int] = ..., committed: _Optional[int] = ..., epochs: _Optional[_Union[EpochTable, _Mapping]] = ..., credit_bytes: _Optional[int] = ..., durability: _Optional[str] = ...) -> None: ...

class Promise(_message.Message):
    __slots__ = ("epoch", "last", "committed", "epochs", "lowered")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    LOWERED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    last: Position
    committed: int
    epochs: EpochTable
    lowered: Position
    def __init__(self, epoch: _Optional[int] = ..., last: _Optional[_Union[Position, _Mapping]] = ..., committed: _Optional[int] = ..., epochs: _Optional[_Union[EpochTable, _Mapping]] = ..., lowered: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes_granted",)
    BYTES_GRANTED_FIELD_NUMBER: _ClassVar[int]
    bytes_granted: int
    def __init__(self, bytes_granted: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("lineage", "branch", "store_id", "name", "epoch", "protocol", "features", "heartbeat_interval_ms", "last")
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    lineage: bytes
    branch: bytes
    store_id: bytes
    name: str
    epoch: int
    protocol: int
    features: _containers.RepeatedScalarFieldContainer[str]
    heartbeat_interval_ms: int
    last: Position
    def __init__(self, lineage: _Optional[bytes] = ..., branch: _Optional[bytes] = ..., store_id: _Optional[bytes] = ..., name: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., heartbeat_interval_ms: _Optional[int] = ..., last: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...

class Truncate(_message.Message):
    __slots__ = ("to", "epoch")
    TO_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    to: Position
    epoch: int
    def __init__(self, to: _Optional[_Union[Position, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class NeedBootstrap(_message.Message):
    __slots__ = ("first", "reason")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    first: int
    reason: str
    def __init__(self, first: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "message", "primary_address", "epoch")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    primary_address: str
    epoch: int
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., primary_address: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class SlotState(_message.Message):
    __slots__ = ("store_id", "name", "acked")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    store_id: bytes
    name: str
    acked: int
    def __init__(self, store_id: _Optional[bytes] = ..., name: _Optional[str] = ..., acked: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("epoch", "last", "committed", "stamp_us", "time_us", "slots", "path", "behind_bytes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    STAMP_US_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BEHIND_BYTES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    last: int
    committed: int
    stamp_us: int
    time_us: int
    slots: _containers.RepeatedCompositeFieldContainer[SlotState]
    path: _containers.RepeatedScalarFieldContainer[str]
    behind_bytes: int
    def __init__(self, epoch: _Optional[int] = ..., last: _Optional[int] = ..., committed: _Optional[int] = ..., stamp_us: _Optional[int] = ..., time_us: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[SlotState, _Mapping]]] = ..., path: _Optional[_Iterable[str]] = ..., behind_bytes: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("snapshot_id", "offset", "store_id", "name", "lineage", "of_follower")
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    OF_FOLLOWER_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: str
    offset: int
    store_id: bytes
    name: str
    lineage: bytes
    of_follower: bool
    def __init__(self, snapshot_id: _Optional[str] = ..., offset: _Optional[int] = ..., store_id: _Optional[bytes] = ..., name: _Optional[str] = ..., lineage: _Optional[bytes] = ..., of_follower: bool = ...) -> None: ...

class SnapshotItem(_message.Message):
    __slots__ = ("info", "chunk")
    INFO_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    info: SnapshotInfo
    chunk: SnapshotChunk
    def __init__(self, info: _Optional[_Union[SnapshotInfo, _Mapping]] = ..., chunk: _Optional[_Union[SnapshotChunk, _Mapping]] = ...) -> None: ...

class SnapshotInfo(_message.Message):
    __slots__ = ("snapshot_id", "bytes_total", "position")
    SNAPSHOT_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    snapshot_id: str
    bytes_total: int
    position: Position
    def __init__(self, snapshot_id: _Optional[str] = ..., bytes_total: _Optional[int] = ..., position: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...

class SnapshotChunk(_message.Message):
    __slots__ = ("offset", "crc32")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32: int
    def __init__(self, offset: _Optional[int] = ..., crc32: _Optional[int] = ...) -> None: ...
