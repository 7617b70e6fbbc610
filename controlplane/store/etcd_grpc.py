"""One real etcd member over gRPC: the adapter behind the port ``MemberRpc``.

Owns one channel, the translation between protobuf and the port's Structs, and the translation of
failures. It never retries and never guesses: a call fails as StoreUnavailable only when the
channel was not connected, so that nothing was sent; once sent, no status proves that etcd did not
execute it, except etcd's own refusals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from msgspec import Struct

from controlplane.store import etcd_pb2 as pb
from controlplane.store.etcd_rpc import (
    Alarm,
    Alarms,
    Compaction,
    Compare,
    DeleteOp,
    Event,
    Header,
    Lease,
    Op,
    PutOp,
    Ranged,
    RangeOp,
    Revoked,
    Status,
    Target,
    Txn,
    TxnDone,
    WatchAnswer,
    WatchStart,
)
from controlplane.store.port import STORE_IS_FULL, KeyValue
from shared.errors import (
    ChangeTooLarge,
    Compacted,
    NotFound,
    NovacronError,
    OutcomeUnknown,
    StoreError,
    StoreFull,
    StoreUnavailable,
    WatchLost,
)

# A page of 2,000 records is about 3 MB, gRPC's default limit 4 MB; a record may be 1.5 MiB.
RECEIVE_BYTES_MAX = 256 * 2**20
# etcd refuses more than 1.5 MiB with an error that we understand; let it.
SEND_BYTES_MAX = 4 * 2**20
# While a channel connects its state is looked at this often: grpc keeps an abandoned wait for a
# change of state queued until the state changes, so many short waits would pile up.
CONNECT_POLL_S = 0.01

# With it a member that is cut off from the quorum ends the stream instead of staying silent.
_NEEDS_LEADER = (("hasleader", "true"),)
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", SEND_BYTES_MAX),
    # etcd answers more than one ping in 5 s with GOAWAY too_many_pings.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The pool retries, knowing what may be repeated; the default back-off of 120 s would hide a
    # member that is back.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
# Statuses with which etcd refuses before it proposes anything to the cluster.
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)
_TOO_LARGE = (
    "etcdserver: request is too large",
    "etcdserver: too many operations in txn request",
    # Go's server, before etcd sees the request; our own limit for answers reads otherwise.
    "grpc: received message larger than max",
)


class EtcdTls(Struct, frozen=True):
    """PEM bytes: the CA that signs members, and our certificate, whose CN is the etcd user."""

    ca: bytes
    certificate: bytes
    key: bytes


class GrpcMember:
    """Speaks to one member; made inside a running loop, which its channel belongs to."""

    def __init__(self, endpoint: str, tls: EtcdTls | None) -> None:
        self._endpoint = endpoint
        self._channel = _channel(endpoint, tls)
        self._range = self._unary("KV/Range", pb.RangeResponse)
        self._txn = self._unary("KV/Txn", pb.TxnResponse)
        self._compact = self._unary("KV/Compact", pb.CompactionResponse)
        self._grant = self._unary("Lease/LeaseGrant", pb.LeaseGrantResponse)
        self._revoke = self._unary("Lease/LeaseRevoke", pb.LeaseRevokeResponse)
        self._status = self._unary("Maintenance/Status", pb.StatusResponse)
        self._alarm = self._unary("Maintenance/Alarm", pb.AlarmResponse)
        self._defragment = self._unary("Maintenance/Defragment", pb.DefragmentResponse)
        self._keep_alive = self._stream("Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse)
        self._watch = self._stream("Watch/Watch", pb.WatchResponse)

    @property
    def endpoint(self) -> str:
        return self._endpoint

    async def range(self, request: RangeOp, deadline_s: float) -> Ranged:
        reply = await self._call(
            self._range, _range_request(request), deadline_s, revision=request.revision
        )
        return Ranged(_header(reply), _key_values(reply.kvs), reply.more, reply.count)

    async def txn(self, request: Txn, deadline_s: float) -> TxnDone:
        message = pb.TxnRequest(
            compare=[_compare(each) for each in request.compares],
            success=[_op(each) for each in request.success],
            failure=[_op(each) for each in request.failure],
        )
        reply = await self._call(self._txn, message, deadline_s)
        reads = tuple(
            _key_values(each.response_range.kvs)
            for each in reply.responses
            if each.HasField("response_range")
        )
        return TxnDone(_header(reply), reply.succeeded, reads)

    async def compact(self, revision: int, deadline_s: float, physical: bool = False) -> Compaction:
        message = pb.CompactionRequest(revision=revision, physical=physical)
        reply = await self._call(self._compact, message, deadline_s, revision=revision)
        return Compaction(_header(reply))

    async def lease_grant(self, ttl_s: int, deadline_s: float) -> Lease:
        message = pb.LeaseGrantRequest(TTL=ttl_s)
        reply = await self._call(self._grant, message, deadline_s, metadata=_NEEDS_LEADER)
        return Lease(_header(reply), reply.ID, reply.TTL)

    async def lease_revoke(self, lease: int, deadline_s: float) -> Revoked:
        message = pb.LeaseRevokeRequest(ID=lease)
        reply = await self._call(self._revoke, message, deadline_s, metadata=_NEEDS_LEADER)
        return Revoked(_header(reply))

    async def lease_keep_alive(self, lease: int, deadline_s: float) -> Lease:
        left_s = await self._connected(deadline_s)
        call = self._keep_alive(timeout=left_s, metadata=_NEEDS_LEADER)
        try:
            await call.write(pb.LeaseKeepAliveRequest(ID=lease))
            reply = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _failure(self._endpoint, error, 0) from error
        finally:
            call.cancel()
        if reply is grpc.aio.EOF:
            raise OutcomeUnknown(f"{self._endpoint} ended a keep-alive without an answer")
        return Lease(_header(reply), reply.ID, reply.TTL)

    async def status(self, deadline_s: float) -> Status:
        reply = await self._call(self._status, pb.StatusRequest(), deadline_s)
        return Status(
            header=_header(reply),
            version=reply.version,
            leader_id=reply.leader,
            db_size_bytes=reply.dbSize,
            db_in_use_bytes=reply.dbSizeInUse,
        )

    async def alarms(self, deadline_s: float) -> Alarms:
        reply = await self._call(self._alarm, pb.AlarmRequest(), deadline_s)
        alarms = tuple(Alarm(each.memberID, pb.AlarmType.Name(each.alarm)) for each in reply.alarms)
        return Alarms(_header(reply), alarms)

    async def disarm(self, alarm: Alarm, deadline_s: float) -> None:
        message = pb.AlarmRequest(
            action=pb.AlarmRequest.DEACTIVATE,
            memberID=alarm.member_id,
            alarm=pb.AlarmType.Value(alarm.name),
        )
        await self._call(self._alarm, message, deadline_s)

    async def defragment(self, deadline_s: float) -> None:
        await self._call(self._defragment, pb.DefragmentRequest(), deadline_s)

    async def watch(self, request: WatchStart, deadline_s: float) -> GrpcWatch:
        left_s = await self._connected(deadline_s)
        call = self._watch(metadata=_NEEDS_LEADER)
        stream = GrpcWatch(self._endpoint, call)
        create = pb.WatchCreateRequest(
            key=_encode(request.key),
            range_end=_encode(request.range_end),
            start_revision=request.start_revision,
            fragment=True,
        )
        try:
            async with asyncio.timeout(left_s):
                await stream.send(pb.WatchRequest(create_request=create))
        except BaseException as error:
            await stream.close()
            if isinstance(error, TimeoutError):
                raise WatchLost(f"{self._endpoint} took no watch in time") from error
            raise
        return stream

    async def close(self) -> None:
        await self._channel.close()

    def _unary(self, path: str, reply: Any) -> Any:
        return self._channel.unary_unary(
            f"/etcdserverpb.{path}",
            request_serializer=_serialize,
            response_deserializer=reply.FromString,
        )

    def _stream(self, path: str, reply: Any) -> Any:
        return self._channel.stream_stream(
            f"/etcdserverpb.{path}",
            request_serializer=_serialize,
            response_deserializer=reply.FromString,
        )

    async def _call(
        self,
        method: Any,
        message: Any,
        deadline_s: float,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        revision: int = 0,
    ) -> Any:
        left_s = await self._connected(deadline_s)
        try:
            return await method(message, timeout=left_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise _failure(self._endpoint, error, revision) from error

    async def _connected(self, deadline_s: float) -> float:
        """Wait for the channel to be connected; return the seconds left of the deadline."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            gone = state in (
                grpc.ChannelConnectivity.TRANSIENT_FAILURE,
                grpc.ChannelConnectivity.SHUTDOWN,
            )
            if gone or loop.time() >= end:
                raise StoreUnavailable(f"etcd member {self._endpoint} is not connected")
            await asyncio.sleep(CONNECT_POLL_S)
            state = self._channel.get_state(try_to_connect=True)
        return max(end - loop.time(), 0.0)


class GrpcWatch:
    """A watch stream of one member; joins what the member sent in fragments."""

    def __init__(self, endpoint: str, call: Any) -> None:
        self._endpoint = endpoint
        self._call = call
        self._fragments: list[Event] = []

    async def send(self, message: Any) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise WatchLost(f"the watch of {self._endpoint} ended: {error}") from error

    async def send_progress_request(self) -> None:
        await self.send(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))

    async def receive(self) -> WatchAnswer:
        while True:
            reply = await self._read()
            events = [_event(each) for each in reply.events]
            if reply.fragment:
                self._fragments += events
                continue
            if events:
                # Progress may arrive between two fragments: only events end a row of them.
                events = self._fragments + events
                self._fragments = []
            return WatchAnswer(
                header=_header(reply),
                events=tuple(events),
                created=reply.created,
                canceled=reply.canceled,
                compact_revision=reply.compact_revision,
                reason=reply.cancel_reason,
            )

    async def close(self) -> None:
        self._call.cancel()

    async def _read(self) -> Any:
        try:
            reply = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise WatchLost(f"the watch of {self._endpoint} ended: {error}") from error
        except asyncio.CancelledError:
            # Closing our end cancels the read as well; only a cancelled task is a cancellation.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WatchLost(f"the watch of {self._endpoint} was closed") from None
        if reply is grpc.aio.EOF:
            raise WatchLost(f"{self._endpoint} ended the watch")
        return reply


def _channel(endpoint: str, tls: EtcdTls | None) -> Any:
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=tls.ca, private_key=tls.key, certificate_chain=tls.certificate
    )
    return grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)


def _failure(endpoint: str, error: Exception, revision: int) -> NovacronError:
    """Return what a failed call means; ``revision`` is the one that was asked for, if any."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return OutcomeUnknown(f"the call to etcd member {endpoint} was cut off: {error}")
    details = error.details() or ""
    if "required revision has been compacted" in details:
        return Compacted(revision + 1)
    if "database space exceeded" in details:
        return StoreFull(STORE_IS_FULL)
    if "requested lease not found" in details:
        return NotFound("the lease is gone")
    if any(text in details for text in _TOO_LARGE):
        return ChangeTooLarge(f"etcd refused the transaction: {details}")
    if "etcdserver: too many requests" in details:
        return StoreUnavailable(f"etcd member {endpoint} is overloaded")
    if error.code() in _REFUSALS:
        return StoreError(f"etcd member {endpoint} refused: {error.code().name} {details}")
    return OutcomeUnknown(f"no answer of etcd member {endpoint}: {error.code().name} {details}")


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _header(reply: Any) -> Header:
    header = reply.header
    return Header(header.cluster_id, header.member_id, header.revision, header.raft_term)


def _key_value(kv: Any) -> KeyValue:
    # A foreign key that is no UTF-8 must not stop a listing.
    key = kv.key.decode("utf-8", "surrogateescape")
    return KeyValue(
        key, kv.value, kv.create_revision, kv.mod_revision, kv.lease, version=kv.version
    )


def _key_values(kvs: Sequence[Any]) -> tuple[KeyValue, ...]:
    return tuple(_key_value(each) for each in kvs)


def _event(event: Any) -> Event:
    return Event(_key_value(event.kv), event.type == pb.Event.DELETE)


def _range_request(op: RangeOp) -> Any:
    return pb.RangeRequest(
        key=_encode(op.key),
        range_end=_encode(op.range_end),
        limit=op.limit,
        revision=op.revision,
        keys_only=op.keys_only,
        min_mod_revision=op.mod_revision_min,
    )


def _op(op: Op) -> Any:
    if isinstance(op, PutOp):
        put = pb.PutRequest(key=_encode(op.key), value=op.value, lease=op.lease)
        return pb.RequestOp(request_put=put)
    if isinstance(op, DeleteOp):
        delete = pb.DeleteRangeRequest(key=_encode(op.key), range_end=_encode(op.range_end))
        return pb.RequestOp(request_delete_range=delete)
    return pb.RequestOp(request_range=_range_request(op))


def _compare(compare: Compare) -> Any:
    key, value = _encode(compare.key), compare.value
    if compare.target is Target.VERSION:
        return pb.Compare(target=pb.Compare.VERSION, key=key, version=value)
    if compare.target is Target.CREATE_REVISION:
        return pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=value)
    return pb.Compare(target=pb.Compare.MOD, key=key, mod_revision=value)
