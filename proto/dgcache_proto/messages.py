"""The messages of `dgcache_pb2`, the very same classes, at a tenth of the price of its import.

`dgcache_pb2` imports what protobuf has for everybody: text format, JSON's types, a second codec in
Python. A process that asks one question needs none of it: the codec is an extension, and makes a
class from a descriptor. Where protobuf runs otherwise, or that extension is another than known
here, this is `dgcache_pb2` itself.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgcache_proto.v1.dgcache_pb2 import *  # noqa: F403 - the types are its own

_FULL = "dgcache_proto.v1.dgcache_pb2"


def _light_pool() -> Any:
    """Return the pool of descriptors with ours in it, or None where only `dgcache_pb2` will do."""
    if _FULL in sys.modules:
        return None
    try:
        from google.protobuf.internal import api_implementation

        if api_implementation.Type() != "upb":
            return None
        from google._upb import _message

        from dgcache_proto.v1.dgcache_descriptor import SERIALIZED

        _message.default_pool.AddSerializedFile(SERIALIZED)
        _made(_message.default_pool.FindMessageTypeByName("dgcache.v1.SessionMessage"))
    except (ImportError, AttributeError, KeyError, TypeError, SystemError):
        return None
    return _message.default_pool


def _made(descriptor: Any) -> Any:
    """Return the class of a message, made after those of its fields, as protobuf's builder does."""
    if descriptor.full_name not in _classes:
        from google._upb import _message
        from google.protobuf.message import Message

        for field in descriptor.fields:
            if field.message_type is not None:
                _made(field.message_type)
        members = {"DESCRIPTOR": descriptor, "__module__": _FULL}
        _classes[descriptor.full_name] = _message.MessageMeta(descriptor.name, (Message,), members)
    return _classes[descriptor.full_name]


def __getattr__(name: str) -> Any:
    """Make a class when it is first named (PEP 562)."""
    if name.startswith("_"):
        raise AttributeError(name)
    if _pool is None or _FULL in sys.modules:
        from dgcache_proto.v1 import dgcache_pb2

        found = getattr(dgcache_pb2, name)
    else:
        try:
            found = _made(_pool.FindMessageTypeByName(f"dgcache.v1.{name}"))
        except KeyError as error:
            raise AttributeError(name) from error
    globals()[name] = found
    return found


_classes: dict[str, Any] = {}
_pool = _light_pool()
