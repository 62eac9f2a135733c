// What client.py and server.py do with nearly every layer of every step, in one call each: no server is silent, a
// message is small and travels whole. Python takes hundreds of microseconds for the same, since the weights that pass
// between two layers leave nothing of it in the caches.
//
// All that is unusual is left to Python, which is the definition: what arrived and is no whole answer, what the socket
// did not take, a deadline that has passed. Nothing here decides about a failure.
//
// Plain C interface; fast_path.py owns all memory. Frames are those of streams.py, headers those of messages.py.

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace {

constexpr uint32_t kMagic = 0x3159524d;  // "MRY1"
constexpr uint32_t kCall = 1, kReply = 2;
constexpr int64_t kAlign = 16;
constexpr double kNever = -1.0;
constexpr double kLongest = 1e6;  // seconds; what claims to have taken longer is no answer

struct Prefix {
  uint32_t magic, header_bytes;
  uint64_t payload_bytes;
};

struct CallHeader {  // followed by `pieces` times (expert, count)
  uint32_t kind, dtype;
  int64_t id;
  uint32_t layer, pieces;
};

struct ReplyHeader {
  uint32_t kind, unused;
  int64_t id;
  double seconds;
};

constexpr int64_t padding(int64_t bytes) { return -bytes & (kAlign - 1); }

constexpr int64_t kReplyHead = sizeof(Prefix) + sizeof(ReplyHeader) + padding(sizeof(ReplyHeader));

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Sends what the socket takes at once: bytes, or -1.
int64_t send_now(int fd, iovec* parts, size_t count) {
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = count;
  const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  return sent < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : sent;
}

// kUnusual: more than one frame, none at all, one that is too large, or, with -1 received, the end of the connection.
enum class Received { kFrame, kUnfinished, kUnusual };

// Appends to the `received` bytes of `buffer` what is there, until they are one frame or nothing more is there.
Received receive_frame(int fd, char* buffer, int64_t capacity, int64_t& received) {
  while (true) {
    if (received >= int64_t(sizeof(Prefix))) {
      Prefix prefix;
      std::memcpy(&prefix, buffer, sizeof prefix);
      if (prefix.magic != kMagic || prefix.header_bytes > uint64_t(capacity) || prefix.payload_bytes > uint64_t(capacity))
        return Received::kUnusual;
      const int64_t bytes = sizeof(Prefix) + prefix.header_bytes + padding(prefix.header_bytes) + prefix.payload_bytes;
      if (received >= bytes) return received == bytes ? Received::kFrame : Received::kUnusual;
    }
    if (received == capacity) return Received::kUnusual;
    const ssize_t read = recv(fd, buffer + received, capacity - received, MSG_DONTWAIT);
    if (read > 0) received += read;
    else if (read < 0 && (errno == EAGAIN || errno == EINTR)) return Received::kUnfinished;
    else return received = -1, Received::kUnusual;
  }
}

}  // namespace

extern "C" {

// A routes.Balance: servers of expert e are those from first[e] to first[e + 1].
struct Balance {
  int64_t experts, num_servers, rows_together;
  double keep;
  const int64_t* first;
  const int64_t* servers;
  double* given;
};

struct Piece {
  int64_t server, expert, count;
};

// Rows order[start] to order[stop], which are with one server.
struct Part {
  int64_t id, server, start, stop, first_piece, pieces;
  int64_t bytes, sent;      // of the frame; sent -1: the connection is of no more use
  int64_t received;         // bytes in the server's buffer; -1: the connection is of no more use
  double begun, answered, seconds;  // answered: when its answer came, or -1; seconds: what the server took
};

struct Exchange {
  int64_t* order;
  Piece* pieces;
  Part* parts;
  const double* buckets;
  int64_t num_parts, num_buckets;
  double seconds_per_row;
};

// A server, by its place in the table: its socket, room for an answer, and how long answers took, by bucket.
struct Line {
  int64_t fd, capacity;
  char* buffer;
  int64_t* latency_counts;
  double* latency_sum;
};

// routes.Balance.deal, to the bit: other ranks of a group may run that. experts: of each of k rows; routed: of the n
// rows of all ranks, among which an expert's are all here or all elsewhere. The order sorts rows by server and expert.
void moray_deal(const Balance* balance, const int64_t* experts, int64_t k, const int64_t* routed, int64_t n,
                Exchange* exchange) {
  const int64_t num_experts = balance->experts;
  std::vector<int64_t> counts(num_experts, 0), own(num_experts, 0), next(num_experts + 1, 0), by_expert(k);
  std::vector<int64_t> busiest, dealt;
  for (int64_t i = 0; i < n; ++i) ++counts[routed[i]];
  for (int64_t i = 0; i < k; ++i) ++own[experts[i]];
  for (int64_t e = 0; e < num_experts; ++e) {
    next[e + 1] = next[e] + own[e];
    if (counts[e]) busiest.push_back(e);
  }
  std::sort(busiest.begin(), busiest.end(),
            [&](int64_t a, int64_t b) { return std::tie(counts[a], a) > std::tie(counts[b], b); });
  std::vector<int64_t> at(next);
  for (int64_t i = 0; i < k; ++i) by_expert[at[experts[i]]++] = i;
  double* const given = balance->given;
  for (int64_t s = 0; s <= balance->num_servers; ++s) given[s] *= balance->keep;
  int64_t num_pieces = 0;
  for (const int64_t e : busiest) {
    const int64_t* const first = balance->servers + balance->first[e];
    const int64_t* const last = balance->servers + balance->first[e + 1];
    const int64_t count = counts[e], parts = std::max<int64_t>(1, count / balance->rows_together);
    dealt.assign(last - first, 0);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t size = count * (part + 1) / parts - count * part / parts;
      const int64_t* const server =
          std::min_element(first, last, [&](int64_t a, int64_t b) { return given[a] < given[b]; });
      given[*server] += double(size);
      dealt[server - first] += size;
    }
    for (int64_t i = 0; own[e] && i < last - first; ++i)
      if (dealt[i]) exchange->pieces[num_pieces++] = {first[i], e, dealt[i]};
  }
  std::sort(exchange->pieces, exchange->pieces + num_pieces, [](const Piece& a, const Piece& b) {
    return std::tie(a.server, a.expert, a.count) < std::tie(b.server, b.expert, b.count);
  });
  exchange->num_parts = 0;
  int64_t row = 0;
  for (int64_t p = 0; p < num_pieces; ++p) {
    const Piece& piece = exchange->pieces[p];
    if (!exchange->num_parts || exchange->parts[exchange->num_parts - 1].server != piece.server)
      exchange->parts[exchange->num_parts++] = {0, piece.server, row, row, p, 0, 0, 0, 0, 0.0, kNever, 0.0};
    Part& part = exchange->parts[exchange->num_parts - 1];
    std::copy_n(&by_expert[next[piece.expert]], piece.count, exchange->order + row);
    next[piece.expert] += piece.count;
    part.stop = row += piece.count;
    ++part.pieces;
  }
}

// Sends every part to its server; ids count up from `id`. x: rows in the order they came. Returns false when some part
// did not go whole, which Part.sent tells.
int moray_send(Exchange* exchange, const Line* lines, const char* x, int64_t row_bytes, uint32_t layer, uint32_t dtype,
               int64_t id) {
  static thread_local std::vector<char> head;
  static thread_local std::vector<iovec> frame;
  bool whole = true;
  for (int64_t p = 0; p < exchange->num_parts; ++p) {
    Part& part = exchange->parts[p];
    const int64_t header = sizeof(CallHeader) + 8 * part.pieces, rows = part.stop - part.start;
    head.assign(sizeof(Prefix) + header + padding(header), 0);
    const Prefix prefix{kMagic, uint32_t(header), uint64_t(rows * row_bytes)};
    const CallHeader call{kCall, dtype, id + p, layer, uint32_t(part.pieces)};
    std::memcpy(&head[0], &prefix, sizeof prefix);
    std::memcpy(&head[sizeof prefix], &call, sizeof call);
    for (int64_t i = 0; i < part.pieces; ++i) {
      const Piece& piece = exchange->pieces[part.first_piece + i];
      const uint32_t pair[2] = {uint32_t(piece.expert), uint32_t(piece.count)};
      std::memcpy(&head[sizeof prefix + sizeof call + 8 * i], pair, sizeof pair);
    }
    frame.assign(1, {head.data(), head.size()});
    for (int64_t i = part.start; i < part.stop; ++i)
      frame.push_back({const_cast<char*>(x) + exchange->order[i] * row_bytes, size_t(row_bytes)});
    part.id = id + p;
    part.bytes = int64_t(head.size()) + rows * row_bytes;
    part.begun = now();
    part.sent = send_now(int(lines[part.server].fd), frame.data(), frame.size());
    whole = whole && part.sent == part.bytes;
  }
  return whole;
}

// client.ExpertClient._count: an answer has come.
static void count(Exchange* exchange, const Line& line, const Part& part) {
  const double latency = part.answered - part.begun;
  const double* const end = exchange->buckets + exchange->num_buckets;
  ++line.latency_counts[std::lower_bound(exchange->buckets, end, latency) - exchange->buckets];
  *line.latency_sum += latency;
  exchange->seconds_per_row += 0.01 * (part.seconds / double(part.stop - part.start) - exchange->seconds_per_row);
}

// Waits for all answers, each until `deadline` and `per_row` for each of its rows have passed, in seconds. Rows come
// to `out` in the order of x. Returns false when Python should look: an answer is late, or it is no answer.
int moray_collect(Exchange* exchange, const Line* lines, char* out, int64_t row_bytes, double deadline, double per_row) {
  static thread_local std::vector<pollfd> waiting;
  while (true) {
    waiting.clear();
    double due = 1e300;
    for (int64_t p = 0; p < exchange->num_parts; ++p) {
      const Part& part = exchange->parts[p];
      if (part.answered != kNever) continue;
      waiting.push_back({int(lines[part.server].fd), POLLIN, 0});
      due = std::min(due, part.begun + deadline + per_row * double(part.stop - part.start));
    }
    if (waiting.empty()) return true;
    const double left = std::min(due - now(), 1.0);
    if (!(left > 0.0)) return false;
    const timespec timeout{time_t(left), long(1e9 * (left - double(time_t(left))))};
    const int ready = ppoll(waiting.data(), waiting.size(), &timeout, nullptr);
    if (ready < 0 && errno != EINTR) return false;
    if (ready <= 0) continue;
    size_t w = 0;
    for (int64_t p = 0; p < exchange->num_parts; ++p) {
      Part& part = exchange->parts[p];
      if (part.answered != kNever || !waiting[w++].revents) continue;
      const Line& line = lines[part.server];
      const Received received = receive_frame(int(line.fd), line.buffer, line.capacity, part.received);
      if (received == Received::kUnfinished) continue;
      if (received == Received::kUnusual || part.received < kReplyHead) return false;
      Prefix prefix;
      ReplyHeader reply;
      std::memcpy(&prefix, line.buffer, sizeof prefix);
      std::memcpy(&reply, line.buffer + sizeof prefix, sizeof reply);
      const int64_t rows = part.stop - part.start;
      if (prefix.header_bytes != sizeof reply || prefix.payload_bytes != uint64_t(rows * row_bytes) ||
          reply.kind != kReply || reply.id != part.id || !(reply.seconds >= 0.0 && reply.seconds < kLongest))
        return false;
      const char* row = line.buffer + kReplyHead;
      for (int64_t i = part.start; i < part.stop; ++i, row += row_bytes)
        std::memcpy(out + exchange->order[i] * row_bytes, row, row_bytes);
      part.received = 0;
      part.seconds = reply.seconds;
      part.answered = now();
      count(exchange, line, part);
    }
  }
}

using Swiglus = void (*)(const void* x, const void* const* w13, const void* const* w2, const int64_t* counts, int64_t n,
                         void* hidden_rows, void* y, int64_t dim, int64_t hidden);

// Packed experts of one server: w13 and w2 [layers, experts], null where it does not hold one; rows [layers, experts]
// counts what was computed. Answers are made in `reply`, from calls in `buffer`; both have `capacity` bytes.
struct Held {
  int64_t layers, experts, dim, hidden, dtype, capacity;
  const void* const* w13;
  const void* const* w2;
  int64_t* rows;
  char* buffer;
  char* reply;
  void* hidden_rows;
  Swiglus swiglus;
};

struct Answer {
  int64_t received;     // bytes in the buffer that are not answered
  int64_t bytes, sent;  // of the reply, 0 when there is none; sent -1: the connection is of no more use
  double seconds;
};

// Answers the call that has arrived, if it is one and whole and this server holds its experts.
void moray_answer(int fd, const Held* held, Answer* answer) {
  static thread_local std::vector<const void*> w13, w2;
  static thread_local std::vector<int64_t> counts, units;
  *answer = {0, 0, 0, 0.0};
  const Received received = receive_frame(fd, held->buffer, held->capacity, answer->received);
  answer->received = std::max<int64_t>(answer->received, 0);
  if (received != Received::kFrame) return;
  Prefix prefix;
  CallHeader call{};
  std::memcpy(&prefix, held->buffer, sizeof prefix);
  if (prefix.header_bytes >= sizeof call) std::memcpy(&call, held->buffer + sizeof prefix, sizeof call);
  if (call.kind != kCall || call.dtype != held->dtype || call.layer >= held->layers || !call.pieces ||
      prefix.header_bytes != sizeof call + 8 * uint64_t(call.pieces))
    return;
  w13.clear(), w2.clear(), counts.clear(), units.clear();
  int64_t rows = 0;
  for (uint32_t i = 0; i < call.pieces; ++i) {
    uint32_t pair[2];
    std::memcpy(pair, held->buffer + sizeof prefix + sizeof call + 8 * i, sizeof pair);
    const int64_t unit = call.layer * held->experts + pair[0];
    if (pair[0] >= held->experts || !held->w13[unit] || !held->w2[unit] || !pair[1]) return;
    w13.push_back(held->w13[unit]), w2.push_back(held->w2[unit]), counts.push_back(pair[1]), units.push_back(unit);
    rows += pair[1];
  }
  const int64_t payload = sizeof prefix + prefix.header_bytes + padding(prefix.header_bytes);
  if (rows * held->dim * 2 != int64_t(prefix.payload_bytes) ||
      kReplyHead + int64_t(prefix.payload_bytes) > held->capacity)
    return;
  const double begun = now();
  held->swiglus(held->buffer + payload, w13.data(), w2.data(), counts.data(), call.pieces, held->hidden_rows,
                held->reply + kReplyHead, held->dim, held->hidden);
  for (size_t i = 0; i < units.size(); ++i) held->rows[units[i]] += counts[i];
  answer->seconds = now() - begun;
  const Prefix reply_prefix{kMagic, sizeof(ReplyHeader), prefix.payload_bytes};
  const ReplyHeader reply{kReply, 0, call.id, answer->seconds};
  std::memset(held->reply, 0, kReplyHead);
  std::memcpy(held->reply, &reply_prefix, sizeof reply_prefix);
  std::memcpy(held->reply + sizeof reply_prefix, &reply, sizeof reply);
  answer->received = 0;
  answer->bytes = kReplyHead + int64_t(prefix.payload_bytes);
  iovec frame{held->reply, size_t(answer->bytes)};
  answer->sent = send_now(fd, &frame, 1);
}

}  // extern "C"
