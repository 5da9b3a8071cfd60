// A peer that vanishes ends the connection, with words, instead of leaving ggml-rpc waiting for it. ggml-rpc.cpp and transport.cpp include
// this file. Only Linux tells enough about a connection for it; other systems send and receive as upstream does.

#pragma once

#include "ggml-impl.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#ifdef __linux__
#    include <netinet/in.h>
#    include <netinet/tcp.h>
#    include <sys/socket.h>
#    include <sys/time.h>
#endif

namespace sherry_rpc {

// What went wrong last on this thread's connection, for lost().
inline thread_local std::string failure;

// Seconds without a sign of life after which a peer counts as lost. A computing or stopped rpc-server gives signs of life: its kernel does.
inline int patience() {
    const char * seconds = std::getenv("SHERRY_RPC_TIMEOUT");
    return std::max(seconds ? std::atoi(seconds) : 30, 4);
}

struct peers { // the servers' names by socket, for messages
    std::mutex mutex;
    std::map<int, std::string> names;

    static peers & all() {
        static peers of_process;
        return of_process;
    }
};

#ifdef __linux__
// For each socket of a connection. `name` is the server's on the client's side.
inline void watch(int fd, const std::string & name = "") {
    const int on = 1, quarter = patience() / 4, three = 3;
    // An idle connection is probed by the kernel.
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &quarter, sizeof(quarter));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &quarter, sizeof(quarter));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &three, sizeof(three));
    // One with unacknowledged data would be retransmitted for a quarter of an hour: again() looks at it from time to time. TCP_USER_TIMEOUT
    // would not do, since it also ends connections to a server that computes and leaves its input unread for long.
    const timeval time = { quarter, 0 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time));
    const std::lock_guard<std::mutex> lock(peers::all().mutex);
    peers::all().names[fd] = name;
}

inline std::string name_of(int fd) {
    const std::lock_guard<std::mutex> lock(peers::all().mutex);
    const std::string name = peers::all().names[fd];
    return name.empty() ? "the client" : "rpc-server " + name;
}

// After a send or recv that returned n <= 0: should it be tried again?
inline bool again(int fd, ssize_t n) {
    int error = n < 0 ? errno : 0;
    if (error == EINTR) {
        return true;
    }
    if (error == EAGAIN || error == EWOULDBLOCK) {
        tcp_info info = {};
        socklen_t size = sizeof(info);
        if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 &&
            ((info.tcpi_unacked == 0 && info.tcpi_probes < 3) || info.tcpi_last_ack_recv < 1000u * (unsigned) patience())) {
            return true;
        }
        error = ETIMEDOUT;
    }
    if (error == ETIMEDOUT || error == EHOSTUNREACH || error == ENETUNREACH) {
        failure = name_of(fd) + " has not answered for " + std::to_string(patience()) + " s: its machine or the network is down";
        GGML_LOG_ERROR("%s\n", failure.c_str());
    } else if (error == 0 || error == ECONNRESET || error == EPIPE) {
        failure = name_of(fd) + " closed the connection: it crashed, was stopped, or refused a request, as a llama.cpp without sherry-gguf "
                                "does with TQ1_25, TQ1_25_64 and STQ1_0. Its output says more";
    } else {
        failure = name_of(fd) + ": " + strerror(error);
    }
    return false;
}

constexpr int send_flags = MSG_NOSIGNAL; // the signal ends a process whose peer is gone, without a word
#else
template <typename Socket> void watch(Socket, const std::string & = "") {}
template <typename Socket> bool again(Socket, int64_t) { return false; }
constexpr int send_flags = 0;
#endif

// Why the connection failed.
inline std::string lost() { return failure.empty() ? "Remote RPC server crashed or returned malformed response" : failure; }

} // namespace sherry_rpc
