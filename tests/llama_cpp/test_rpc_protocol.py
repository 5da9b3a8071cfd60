"""rpc-server and requests that ggml's client does not send, and a client and servers of other versions.

Upstream's server ends with an assertion on many malformed requests. Ours may do so too, but it must not end in any other way, and what
upstream's survives it must survive.
"""

import contextlib
import re
import signal
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import rpc_wire
from built_tools import run
from rpc_wire import F16, F32, HELLO_SIZE, I32, Client, Tensor
from test_cluster import ENV, Server, free_port

from sherry_gguf import gguf_type

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
KINDS = gguf_type.TYPES


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "log", free_port(), args=["-d", "CPU,CPU"])
    yield server
    server.stop()


def lives(server):
    """True if the server answers the next client, False if it ended with an assertion, which is all else that it may do."""
    try:
        with Client(server.endpoint) as client:
            assert client.devices() == 2
        return True
    except ConnectionError:
        assert server.process.wait(60) == -signal.SIGABRT, server.output()
        assert "GGML_ASSERT(" in server.output(), server.output()
        return False


class Product:
    """A weight matrix of 64 rows, its activations and their product in one buffer; Q8_0 holds the activations exactly."""

    def __init__(self, client, kind, columns=1):
        rng = np.random.default_rng(0)
        self.client, self.kind, n, rows = client, kind, 2 * kind.size, 64
        row, self.buffer = 2 * kind.bytes, client.allocate(1 << 20)
        packed = rng.integers(0, 256, (rows, 2, kind.bytes), dtype=np.uint8)
        packed[..., -2:] = np.float16([0.5]).view(np.uint8)
        self.packed = packed.reshape(rows, row)
        x = rng.integers(-127, 128, (columns, n // 32, 32)).astype(np.float32)
        x[..., ::8] = 127  # in each block of Q8_0, also in the order that repacked STQ1_0 takes
        self.x = x.reshape(columns, n)
        self.wanted = self.x @ self.kind.dequantize(self.packed).T
        self.w = Tensor(1, kind.type_id, (n, rows), (kind.bytes, row, rows * row), self.buffer)
        self.inputs = Tensor(2, F32, (n, columns), (4, 4 * n, 4 * n * columns), self.buffer, 1 << 18)
        self.result = Tensor(3, F32, (rows, columns), (4, 4 * rows, 4 * rows * columns), self.buffer, 1 << 19, "MUL_MAT", b"",
                             [self.w, self.inputs])  # fmt: skip
        client.set(self.w, self.packed)
        client.set(self.inputs, self.x)

    def compute(self, device=0, again=False):
        self.client.set(self.result, np.full_like(self.wanted, np.nan))
        if again:
            self.client.compute_again(device)
        else:
            self.client.compute([self.w, self.inputs], self.result, device)
        return self.client.get(self.result, self.wanted.nbytes, np.float32).reshape(self.wanted.shape)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_two_devices_share_a_matrix(kind, server):
    """One multiplies by it; the other reads its rows, so it stays plain from then on, for the first one's graph as well."""
    with Client(server.endpoint) as client:
        of = Product(client, kind)
        assert (of.compute(0) == of.wanted).all() and (of.compute(0, again=True) == of.wanted).all()
        ids = Tensor(4, I32, (3,), (4, 12), of.buffer, 3 << 18)
        rows = Tensor(5, F32, (of.w.ne[0], 3), (4, 4 * of.w.ne[0]), of.buffer, (3 << 18) + 1024, "GET_ROWS", b"", [of.w, ids])
        client.set(ids, np.int32([2, 0, 63]))
        client.compute([of.w, ids], rows, device=1)
        found = client.get(rows, 12 * of.w.ne[0], np.float32).reshape(3, -1)
        assert (found == kind.dequantize(of.packed[[2, 0, 63]])).all()
        assert (of.compute(0, again=True) == of.wanted).all()
        assert (client.get(of.w, of.packed.nbytes) == of.packed.reshape(-1)).all()
    assert lives(server) and server.repacked() == 1, server.output()


def test_an_empty_buffer(server):
    for end in "freed", "by the end of the connection":
        with Client(server.endpoint) as client:
            buffer = client.allocate(0)
            client.clear(buffer, 1)
            if end == "freed":
                client.free(buffer)
            assert client.devices() == 2, end
    assert lives(server)


# Shape and strides of a matrix and its activations. Upstream multiplies by the first and the last, and asserts on the second.
MALFORMED = {
    "no columns": ({"ne": (0, 64), "nb": (22, 0, 0)}, {"ne": (0, 1), "nb": (4, 0, 0)}),
    "blocks without a size": ({"ne": (128, 64), "nb": (0, 22, 22 * 64)}, {"ne": (128, 1), "nb": (4, 512, 512)}),
    "a part of a block": ({"ne": (130, 64), "nb": (22, 22, 22 * 64)}, {"ne": (130, 1), "nb": (4, 520, 520)}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_weights_are_not_repacked(name, server):
    w, x = MALFORMED[name]
    with Client(server.endpoint) as client:
        buffer = client.allocate(1 << 16)
        client.clear(buffer, 0)
        w = Tensor(1, KINDS["TQ1_25"].type_id, buffer=buffer, **w)
        x = Tensor(2, F32, buffer=buffer, offset=1 << 14, **x)
        client.compute([w, x], Tensor(3, F32, (64, 1), (4, 256), buffer, 1 << 15, "MUL_MAT", b"", [w, x]))
        with contextlib.suppress(ConnectionError):
            client.devices()
    if name == "blocks without a size":
        assert not lives(server) and "GGML_ASSERT(nb00 == ggml_type_size(src0->type))" in server.output(), server.output()
    else:
        assert lives(server), server.output()
    assert server.repacked() == 0, server.output()


@pytest.mark.parametrize("what", ["a result whose rows overlap", "more activations than experts used"])
def test_a_malformed_product_is_not_repacked(what, server):
    """Sizes that would not bound the number of columns, and with it the size of the work buffer."""
    with Client(server.endpoint) as client:
        of = Product(client, KINDS["TQ1_25"])
        if what == "a result whose rows overlap":
            of.inputs.ne, of.inputs.nb = (256, 2), (4, 0, 0)
            of.result.ne, of.result.nb = (64, 2), (4, 0, 0)
            tensors = [of.w, of.inputs]
        else:
            ids = Tensor(4, I32, (1, 1), (4, 4), of.buffer, 3 << 18)
            of.inputs.ne, of.inputs.nb = (256, 5, 1), (4, 0, 0)
            of.result.op, of.result.src = "MUL_MAT_ID", [of.w, of.inputs, ids]
            client.set(ids, np.int32([0]))
            tensors = of.result.src
        client.compute(tensors, of.result)
        with contextlib.suppress(ConnectionError):
            client.devices()
    lives(server)
    assert server.repacked() == 0, server.output()


def test_attention_with_a_result_that_is_too_small(server):
    """Neither an error nor a byte beyond the result."""
    tokens, heads, keys, size = 4, 2, 256, 64
    with Client(server.endpoint) as client:
        buffer = client.allocate(1 << 20)
        client.clear(buffer, 0)
        q = Tensor(1, F32, (size, tokens, heads), (4, 4 * size, 4 * size * tokens, 4 * size * tokens * heads), buffer)
        kv = [Tensor(2 + i, F16, (size, keys, heads), (2, 2 * size, 2 * size * keys, 2 * size * keys * heads), buffer, (1 + i) << 18)
              for i in range(2)]  # fmt: skip
        params = struct.pack("<fff", 0.125, 0, 0)
        small = Tensor(4, F32, (size, 1, 1), (4, 4 * size), buffer, 3 << 18, "FLASH_ATTN_EXT", params, [q, *kv])
        behind = Tensor(5, F32, (1 << 14,), (4, 1 << 16), buffer, (3 << 18) + 4 * size)
        client.set(behind, np.full(1 << 14, 7, np.float32))
        client.compute([q, *kv], small)
        with contextlib.suppress(ConnectionError):
            assert (client.get(behind, 1 << 16, np.float32) == 7).all()
    lives(server)


# ---- other versions (docs/cluster.md, "Mixed versions") ----


class FakeServer:
    """Answers the first request, HELLO, with `answer`, or closes the connection; then ends it at the second."""

    def __init__(self, answer=b""):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.answer = answer
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        connection, _ = self.socket.accept()
        with connection:
            connection.recv(9 + HELLO_SIZE, socket.MSG_WAITALL)
            if self.answer:
                connection.sendall(struct.pack("<Q", len(self.answer)) + self.answer)
                connection.recv(9, socket.MSG_WAITALL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thread.join(60)
        self.socket.close()


def hello(major, minor, patch):
    return bytes([major, minor, patch, 0]) + bytes(HELLO_SIZE)


def client_of(fake):
    code, text = run("llama-bench", "--rpc", fake.endpoint, "--list-devices", env=ENV)
    assert code == -signal.SIGABRT, text
    return text


@pytest.mark.parametrize("major, minor", [(-1, 0), (1, 0), (0, 1)])
def test_a_server_with_another_protocol_is_refused(major, minor):
    wanted = rpc_wire.version()
    other = wanted[0] + major, wanted[1] + minor, wanted[2]
    with FakeServer(hello(*other)) as fake:
        text = client_of(fake)
    assert (
        f"RPC server version mismatch: {other[0]}.{other[1]}.{other[2]}" in text and f"RPC handshake failed for {fake.endpoint}" in text
    ), text


@pytest.mark.parametrize("when", ["at once", "after HELLO"])
def test_a_server_that_refuses_a_request(when):
    """As upstream's does with our types, and one that speaks another protocol with everything."""
    with FakeServer(hello(*rpc_wire.version()) if when == "after HELLO" else b"") as fake:
        text = client_of(fake)
    assert f"rpc-server {fake.endpoint} closed the connection: it crashed, was stopped, or refused a request, as a llama.cpp without " \
           "sherry-gguf does with TQ1_25, TQ1_25_64 and STQ1_0. Its output says more" in text, text  # fmt: skip


def test_a_server_refuses_types_that_it_does_not_know(server):
    """With the words that upstream's has for ours: their numbers are beyond its types, and the code is upstream's."""
    upstreams, ours = map(int, re.findall(r"^[-+] *GGML_TYPE_COUNT *= (\d+),", (REPO / "ggml_patch" / "hooks.patch").read_text(), re.M))
    assert {kind.type_id for kind in KINDS.values()} == {43, 125, 126} and upstreams == 43 and ours == 127
    with Client(server.endpoint) as client:
        client.send("INIT_TENSOR", Tensor(1, ours, (128, 64), (22, 22)).packed())
        with pytest.raises(ConnectionError):
            client.devices()
    assert lives(server) and f"invalid tensor type received: {ours}" in server.output(), server.output()


def test_clients_with_another_protocol_are_refused(server):
    host, port = server.endpoint.split(":")
    # An older HELLO was shorter; before that there was none.
    for data, words in (struct.pack("<BQ", 14, 0), "HELLO request size mismatch"), (struct.pack("<BQ", 15, 0), "Expected HELLO command"):
        with socket.create_connection((host, int(port)), timeout=60) as old:
            old.sendall(data)
            with contextlib.suppress(ConnectionResetError):  # if the server has not read all
                assert old.recv(1) == b""
        assert lives(server) and words in server.output(), server.output()
