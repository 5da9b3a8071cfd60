"""A client of rpc-server that speaks the protocol itself, so it can send what ggml's client would not.

The messages are those of ggml-rpc.cpp: a request is a command (1 byte), its size (8 bytes) and its data; an answer is a size and data.
"""

import re
import socket
import struct
from dataclasses import dataclass, field

import numpy as np

from sherry_gguf import llama_cpp

COMMANDS = ["ALLOC_BUFFER", "GET_ALIGNMENT", "GET_MAX_SIZE", "BUFFER_GET_BASE", "FREE_BUFFER", "BUFFER_CLEAR", "SET_TENSOR",
            "SET_TENSOR_HASH", "GET_TENSOR", "COPY_TENSOR", "GRAPH_COMPUTE", "GET_DEVICE_MEMORY", "INIT_TENSOR", "GET_ALLOC_SIZE",
            "HELLO", "DEVICE_COUNT", "GRAPH_RECOMPUTE", "MEMSET_TENSOR"]  # fmt: skip
HELLO_SIZE = 24  # the request's; the answer has four bytes before them: major, minor and patch version, and padding
F32, F16, I32 = 0, 1, 26
COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE: without it ggml skips a node


def _header(name):
    return (llama_cpp.source_dir() / "ggml" / "include" / name).read_text()


def version():
    """The protocol's (major, minor, patch)."""
    return tuple(int(re.search(rf"RPC_PROTO_{part}_VERSION +(\d+)", _header("ggml-rpc.h"))[1]) for part in ("MAJOR", "MINOR", "PATCH"))


def operation(name):
    """The number of GGML_OP_NAME."""
    (names,) = re.findall(r"enum ggml_op \{(.*?)\}", _header("ggml.h"), re.S)
    return re.findall(r"^ *GGML_OP_(\w+)", names, re.M).index(name)


@dataclass
class Tensor:
    """ggml's fields, without any check. `offset` is in its buffer, in bytes."""

    id: int
    type: int
    ne: tuple
    nb: tuple
    buffer: tuple = (0, 0)  # the server's pointer and the address of the first byte
    offset: int = 0
    op: str = "NONE"
    params: bytes = b""
    src: list = field(default_factory=list)

    def packed(self):
        ne, nb = (*self.ne, *[1] * (4 - len(self.ne))), (*self.nb, *[self.nb[-1]] * (4 - len(self.nb)))
        src = [t.id for t in self.src] + [0] * (10 - len(self.src))
        pointer, base = self.buffer
        return struct.pack("<QIQ4I4II64si10QQQQ64si", self.id, self.type, pointer, *ne, *nb, operation(self.op), self.params, COMPUTE, *src,
                           0, 0, base + self.offset, b"", 0)  # fmt: skip


class Client:
    """A connection after its HELLO. ConnectionError if the server ends it."""

    def __init__(self, endpoint):
        host, port = endpoint.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.version = tuple(self.ask("HELLO", bytes(HELLO_SIZE))[:3])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, command, data):
        self.socket.sendall(struct.pack("<BQ", COMMANDS.index(command), len(data)) + data)

    def ask(self, command, data=b""):
        self.send(command, data)
        return self.receive(struct.unpack("<Q", self.receive(8))[0])

    def receive(self, size):
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data

    def devices(self):
        return struct.unpack("<I", self.ask("DEVICE_COUNT"))[0]

    def allocate(self, size, device=0):
        """A buffer: (its pointer, the address of its first byte)."""
        pointer, _ = struct.unpack("<QQ", self.ask("ALLOC_BUFFER", struct.pack("<IQ", device, size)))
        return pointer, struct.unpack("<Q", self.ask("BUFFER_GET_BASE", struct.pack("<Q", pointer)))[0]

    def clear(self, buffer, value):
        self.send("BUFFER_CLEAR", struct.pack("<QB", buffer[0], value))

    def free(self, buffer):
        self.send("FREE_BUFFER", struct.pack("<Q", buffer[0]))

    def set(self, tensor, values):
        self.send("SET_TENSOR", tensor.packed() + struct.pack("<BQ", 0, 0) + np.ascontiguousarray(values).tobytes())

    def get(self, tensor, size, dtype=np.uint8):
        """The first `size` bytes."""
        return np.frombuffer(self.ask("GET_TENSOR", tensor.packed() + struct.pack("<QQ", 0, size)), dtype)

    def compute(self, tensors, result, device=0):
        """A graph with one node."""
        packed = b"".join(t.packed() for t in [*tensors, result])
        self.send("GRAPH_COMPUTE", struct.pack("<IIQI", device, 1, result.id, len(tensors) + 1) + packed)

    def compute_again(self, device=0):
        self.send("GRAPH_RECOMPUTE", struct.pack("<I", device))
