"""rpc-server: a model on several hosts says what it says on one, weights are repacked, and a lost server is an error in words.

Three hosts in network namespaces of their own are joined by a switch: a client and two servers. That takes Linux, root and iproute2.
"""

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import small_models
from built_tools import run
from conftest import LONG, greedy, upstream_f32

from sherry_gguf import kernels, llama_cpp

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PORT = 50052
TYPES = ["TQ1_25", "TQ1_25_64", "STQ1_0"]
LOST = 4  # seconds, the least that SHERRY_RPC_TIMEOUT takes
# Hosts share this machine's cores: waiting threads give way to others.
ENV = os.environ | {"SHERRY_RPC_TIMEOUT": str(LOST), "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}


def ip(*args, check=True):
    return subprocess.run(["ip", *map(str, args)], check=check, capture_output=True, text=True)


class Server:
    """An rpc-server with two threads, on a host or here; its output is in `log`."""

    def __init__(self, log, port, address="127.0.0.1", prefix=(), args=(), **env):
        self.log, self.endpoint = log, f"{address}:{port}"
        with log.open("w") as output:
            self.process = subprocess.Popen([*prefix, llama_cpp.tool("rpc-server"), "-H", address, "-p", str(port), "-t", "2", *args],
                                            env=ENV | env, stdin=subprocess.DEVNULL,
                                            stdout=output, stderr=subprocess.STDOUT)  # fmt: skip
        self.wait(lambda: re.search(rf":{port:04X} \S+ 0A ", Path(f"/proc/{self.process.pid}/net/tcp").read_text()))  # it listens

    def output(self):
        return self.log.read_text()

    def wait(self, done):
        for _ in range(1000):
            assert self.process.poll() is None, self.output()
            if done():
                return
            time.sleep(0.05)
        self.stop()
        raise AssertionError(self.output())

    def wait_for_the_end_of_a_connection(self, since):
        self.wait(lambda: "Client connection closed" in self.output()[since:])

    def repacked(self):
        """Matrices, by its own account."""
        return sum(map(int, re.findall(r"rpc-server: repacked (\d+) matrices", self.output())))

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Cluster:
    """Hosts 0 (the client), 1 and 2, whose addresses end in 1, 2 and 3."""

    def __init__(self):
        self.names = [f"sherry-{os.getpid()}-{name}" for name in ("switch", 0, 1, 2)]
        self.switch, *self.hosts = self.names
        try:
            self.set_up()
        except BaseException:
            self.close()
            raise

    def set_up(self):
        for name in self.names:
            ip("netns", "add", name)
        self.delayed = True
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for i, host in enumerate(self.hosts):
            ip("-n", host, "link", "add", "eth", "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
            ip("-n", host, "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth")
            ip("-n", host, "link", "set", "eth", "up")
            ip("-n", host, "link", "set", "lo", "up")
            # Half a millisecond each way, as between machines on a slow switch. Not every kernel has netem, nor every iproute2 tc.
            delay = ["tc", "-n", host, "qdisc", "add", "dev", "eth", "root", "netem", "delay", "500us"]
            self.delayed &= bool(shutil.which("tc")) and subprocess.run(delay, capture_output=True).returncode == 0

    def on(self, host):
        return ["ip", "netns", "exec", self.hosts[host]]

    def serve(self, host, log, **env):
        return Server(log, PORT, f"10.77.0.{host + 1}", self.on(host), **env)

    def unplug(self, host):
        """Packets to and from the host are dropped from now on, and nobody is told."""
        ip("-n", self.switch, "link", "set", f"port{host}", "nomaster")

    def close(self):
        for name in self.names if shutil.which("ip") else ():
            ip("netns", "delete", name, check=False)


@pytest.fixture(scope="module")
def network():
    """What makes clusters; skips with the reason if this machine cannot."""
    if os.geteuid() != 0:
        pytest.skip("a cluster of network namespaces needs root")
    try:
        cluster = Cluster()
    except FileNotFoundError as error:
        pytest.skip(f"a cluster of network namespaces needs iproute2 (Debian: apt-get install iproute2): {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(network, tmp_path):
    """The network with an rpc-server on hosts 1 and 2: (network, [server, server])."""
    servers = [network.serve(host, tmp_path / f"server{host}.log") for host in (1, 2)]
    yield network, servers
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of two layers by name: "llama" in each type and in Q4_0, and a mixture of experts in TQ1_25."""
    root = tmp_path_factory.mktemp("cluster")
    for name in "llama", "mixtral":
        small_models.make(root / name, name)
        upstream_f32(root / name, root / f"{name}.f32.gguf")
    for name, kind in [*[("llama", kind) for kind in [*TYPES, "Q4_0"]], ("mixtral", "TQ1_25")]:
        code, text = run("llama-quantize", root / f"{name}.f32.gguf", root / f"{name}-{kind}.gguf", kind, 2)
        assert code == 0, text
    return {kind: root / f"llama-{kind}.gguf" for kind in [*TYPES, "Q4_0"]} | {"mixtral": root / "mixtral-TQ1_25.gguf"}


def client(network):
    return [*network.on(0), llama_cpp.tool("llama-cli")]


def endpoints(servers):
    return ",".join(server.endpoint for server in servers)


# llama has 14 matrices in 2 layers. With STQ1_0 ffn_down, whose rows are not whole blocks, is Q4_0. Mixtral's experts are stacks.
MATRICES = {"TQ1_25": 14, "TQ1_25_64": 14, "STQ1_0": 12, "mixtral": 14, "Q4_0": 0}


@pytest.mark.parametrize("name", MATRICES)
def test_hosts_say_what_one_says(name, models, cluster):
    """On one server; on two with the layers split; on two and the client itself."""
    network, servers = cluster
    print("latency by netem" if network.delayed else "without latency: the kernel lacks netem, or this machine tc")
    model = models[name]
    for prompt in "def read(self):", LONG:  # one column by tables, few by codes, many by panels or wide tables if the CPU has them
        wanted = greedy(model, "--no-warmup", prompt=prompt, env=ENV)
        for use, flags, on_servers in (servers[:1], ["-ngl", 99], 1), (servers, ["-ngl", 99, "-ts", "1,1"], 1), (servers, ["-ngl", 2], 0.5):
            before = [server.repacked() for server in servers]
            said = greedy(model, "--rpc", endpoints(use), *flags, "--no-warmup", prompt=prompt, command=client(network), env=ENV)
            assert said == wanted, flags
            repacked = [server.repacked() - old for server, old in zip(servers, before)]
            assert sum(repacked) == on_servers * MATRICES[name], (flags, repacked)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def unused_tcp_port():
    return free_port()


@pytest.mark.parametrize("env", [{"SHERRY_RPC_REPACK": "0"}, {"SHERRY_ISA": "scalar"}], ids=lambda env: next(iter(env)))
def test_a_server_without_repacking(env, models, tmp_path, unused_tcp_port):
    server = Server(tmp_path / "log", unused_tcp_port, **env)
    try:
        said = greedy(models["TQ1_25"], "--rpc", server.endpoint, "-ngl", 99, env=ENV)
        assert said == greedy(models["TQ1_25"], "--no-repack", env=ENV) and server.repacked() == 0
    finally:
        server.stop()


@pytest.fixture(scope="module")
def rpc_client(tmp_path_factory):
    program, ggml, lib = tmp_path_factory.mktemp("rpc") / "client", llama_cpp.source_dir() / "ggml", llama_cpp.library("ggml").parent
    includes = ["-I", ggml / "include", "-I", ggml / "src"]
    libraries = ["-L", lib, "-lggml", "-lggml-base", "-lggml-cpu", "-lggml-rpc", f"-Wl,-rpath,{lib}"]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", *includes, HERE / "rpc_client.cpp", *libraries, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    return program


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("isa", kernels.available())
def test_clients_see_plain_blocks_whatever_they_do(isa, kind, rpc_client, tmp_path, unused_tcp_port):
    """rpc_client.cpp reads, writes, copies and clears matrices between products, by row and whole, in five shapes."""
    server = Server(tmp_path / "log", unused_tcp_port, SHERRY_ISA=isa)
    try:
        done = subprocess.run([rpc_client, server.endpoint, kind.lower()], capture_output=True, text=True, timeout=300)
    finally:
        server.stop()
    assert done.returncode == 0 and len(re.findall("^ok: ", done.stdout, re.M)) == 5 * 23, done.stdout[-3000:] + done.stderr[-3000:]
    assert server.repacked() == (0 if isa == "scalar" else 4 * 10), server.output()  # one shape has too few rows


# ---- a server dies ----


def start_talking(network, model, *args):
    """llama-completion on host 0, which would talk for hours; returned once it does."""
    process = subprocess.Popen([*network.on(0), llama_cpp.tool("llama-completion"), "-m", model, "-p", "def", "-n", "-1", "-c", "256",
                                "--ignore-eos", "--context-shift", "-no-cnv", "-t", "2", "-ngl", "99", *map(str, args)],
                               env=ENV, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    seen = b""
    while b"generate: n_ctx" not in seen:
        seen += printed(process, seen)
    printed(process, seen)
    return process


def printed(process, before=b""):
    """What a client prints next. It may take no more than a minute, else it is killed."""
    ready, _, _ = select.select([process.stdout], [], [], 60)
    piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
    if not piece:
        process.kill()
        process.wait()
        raise AssertionError(f"{'ended' if ready else 'silent'} after {before!r}")
    return piece


def end(process):
    """How a client ended: (exit code, output). It may take no more than a minute, else it is killed."""
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    return process.returncode, output.decode(errors="replace")


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_server_is_an_error_in_words(which, models, cluster):
    network, servers = cluster
    process = start_talking(network, models["TQ1_25"], "--rpc", endpoints(servers), "-ts", "1,1")
    servers[which].process.kill()
    code, text = end(process)
    assert code == -signal.SIGABRT and f"rpc-server {servers[which].endpoint} closed the connection: it crashed, was stopped" in text, text
    other = servers[1 - which]
    other.wait_for_the_end_of_a_connection(since=other.output().rindex("Accepted"))
    assert greedy(models["TQ1_25"], "--rpc", other.endpoint, "-ngl", 99, command=client(network), env=ENV)


def test_a_vanished_host_is_an_error_in_words(models, network, tmp_path):
    """Nothing arrives any more, neither data nor resets. The client ends; the server drops the client and serves the next one."""
    server = network.serve(1, tmp_path / "log")
    try:
        process = start_talking(network, models["TQ1_25"], "--rpc", server.endpoint)
        since = server.output().rindex("Accepted")
        network.unplug(1)
        code, text = end(process)
        assert code == -signal.SIGABRT and f"rpc-server {server.endpoint} has not answered for {LOST} s" in text, text
        server.wait_for_the_end_of_a_connection(since)
    finally:
        server.stop()
        ip("-n", network.switch, "link", "set", "port1", "master", "bridge")


def test_a_stopped_server_is_waited_for(models, network, tmp_path):
    """It may be computing: its kernel answers, so there is no hurry."""
    server = network.serve(1, tmp_path / "log")
    try:
        process = start_talking(network, models["TQ1_25"], "--rpc", server.endpoint)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(3 * LOST)
        assert process.poll() is None
        server.process.send_signal(signal.SIGCONT)
        for _ in range(3):  # it goes on
            printed(process)
        process.kill()
        process.wait()
    finally:
        server.stop()


def test_no_server_is_an_error_in_words(models, network):
    done = subprocess.run([*client(network), "-m", models["TQ1_25"], "--rpc", "10.77.0.2:1", "-st"], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode != 0 and "Failed to connect to 10.77.0.2:1" in done.stderr, done.stderr
