"""Prints what `dgcache_descriptor.py` must be: the descriptor in `dgcache_pb2` by itself."""

import textwrap

from dgcache_proto.v1 import dgcache_pb2

_WIDTH = 72


def descriptor_module() -> str:
    """Return the module's text."""
    packed = dgcache_pb2.DESCRIPTOR.serialized_pb.hex()
    lines = "\n".join(f'    "{line}"' for line in textwrap.wrap(packed, _WIDTH))
    return (
        '"""The contract as protobuf packs it. Generated; `make proto` writes it anew."""\n\n'
        f"SERIALIZED = bytes.fromhex(\n{lines}\n)\n"
    )


if __name__ == "__main__":
    print(descriptor_module(), end="")
