"""The messages of orcaserve.proto as classes, made from its descriptor when this is imported.

There is no generated code: that is tied to versions of protobuf, and a descriptor is not.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "orcaserve.v1"
SERVICE = f"{PACKAGE}.OrcaServe"


def _load() -> dict[str, Any]:
    """The classes by their names."""
    data = files("orcaserve.serve.rpc").joinpath("orcaserve.binpb").read_bytes()
    pool = descriptor_pool.Default()  # where reflection looks
    found = {}
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
        for message in file.message_type:
            descriptor = pool.FindMessageTypeByName(f"{file.package}.{message.name}")
            found[message.name] = message_factory.GetMessageClass(descriptor)
    return found


_CLASSES = _load()
AbortReply = _CLASSES["AbortReply"]
AbortRequest = _CLASSES["AbortRequest"]
Alternative = _CLASSES["Alternative"]
GenerateReply = _CLASSES["GenerateReply"]
GenerateRequest = _CLASSES["GenerateRequest"]
TokenLogprobs = _CLASSES["TokenLogprobs"]
Usage = _CLASSES["Usage"]
