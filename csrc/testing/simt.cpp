#include "simt.hpp"

#include <ucontext.h>

#include <deque>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t STACK = 1 << 17;
constexpr unsigned WARP = 32;

enum class Wait { none, block, warp, cluster, forever };
constexpr const char* WAITS[] = {"runs", "waits for its block", "waits for its warp", "waits for its cluster", "has ended"};

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};

// Where something that does not run will go on. The compiler's own jumps: swapcontext, and longjmp as a sanitizer has
// it, call the system each time.
struct Place {
  void* there[5];
  ucontext_t start;
  bool started = true;
};

struct Fibre {
  Place place;
  std::unique_ptr<char[]> stack{new char[STACK]};
  unsigned thread, block;  // the latter within the cluster
  unsigned urgency;
  Wait wait;
  unsigned mask;
  Site site;
  uint64_t value, seen[WARP];
  size_t pieces;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Piece {
  std::unique_ptr<char[]> memory;
  int64_t bytes;
};

struct Block {
  unsigned waiting = 0, ended = 0;
  int vote = 0;
  std::vector<Piece> pieces;
  int64_t taken = 0;
};

// One cluster at a time.
struct Machine {
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Fibre*> ready;
  std::vector<Block> blocks;
  const std::function<void()>* body = nullptr;
  Launch launch{};
  unsigned first_block = 0, in_cluster = 0;
  Fibre* current = nullptr;
  Place scheduler;
  std::string error;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;

  std::mt19937_64 random;
  std::set<std::string> sites;
  std::string dropped;
  int64_t short_by = 0;
};

Machine& machine() {
  static Machine one;
  return one;
}

[[gnu::noinline, gnu::no_sanitize_address]] void go_to(Place& to) {
  if (std::exchange(to.started, true)) __builtin_longjmp(to.there, 1);
  setcontext(&to.start);
}

[[gnu::noinline, gnu::no_sanitize_address]] void jump(Place& from, Place& to) {
  if (__builtin_setjmp(from.there) == 0) go_to(to);
}

void switch_to(Place& from, Place& to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, size);
  jump(from, to);
  const void* bottom;
  size_t bottom_size;
  __sanitizer_finish_switch_fiber(fake, &bottom, &bottom_size);
#else
  jump(from, to);
#endif
}

void leave() {
  Machine& m = machine();
  switch_to(m.current->place, m.scheduler, m.scheduler_stack, m.scheduler_stack_size);
}

void fail(const std::string& what) {
  machine().error = what;
  leave();
}

void enter() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
  for (;;) {  // one block after another
    (*m.body)();
    m.current->wait = Wait::forever;
    leave();
  }
}

void resume(Fibre& fibre) {
  Machine& m = machine();
  m.current = &fibre;
  const unsigned block = m.first_block + fibre.block;
  threadIdx = {fibre.thread, 0, 0};
  blockIdx = {block % m.launch.grid.x, block / m.launch.grid.x, 0};
  switch_to(m.scheduler, fibre.place, fibre.stack.get(), STACK);
}

void make_ready(Fibre& fibre) {
  fibre.wait = Wait::none;
  machine().ready.push_back(&fibre);
}

Fibre& fibre_of(unsigned block, unsigned thread) {
  Machine& m = machine();
  return *m.fibres[block * unsigned(m.launch.threads) + thread];
}

// Some warps run far ahead of the others, which is when a barrier is missed; and which do changes now and then.
void draw_urgencies(unsigned block) {
  Machine& m = machine();
  unsigned urgency = 0;
  for (unsigned t = 0; t < unsigned(m.launch.threads); ++t) {
    if (t % WARP == 0) urgency = unsigned(m.random());
    fibre_of(block, t).urgency = urgency;
  }
}

Fibre& next_to_run() {
  Machine& m = machine();
  size_t best = 0;
  uint64_t draws = m.random();
  for (int i = 0; i < 4; ++i, draws >>= 16) {
    const size_t one = (draws & 0xffff) * m.ready.size() >> 16;
    if (i == 0 || m.ready[one]->urgency > m.ready[best]->urgency) best = one;
  }
  std::swap(m.ready[best], m.ready.back());
  Fibre& fibre = *m.ready.back();
  m.ready.pop_back();
  return fibre;
}

// What is left of its shared memory is not to be read.
void end_thread(const Fibre& fibre) {
  Machine& m = machine();
  Block& block = m.blocks[fibre.block];
  if (++block.ended < unsigned(m.launch.threads)) return;
  for (const Piece& piece : block.pieces) std::memset(piece.memory.get(), 0xff, size_t(std::max<int64_t>(piece.bytes - m.short_by, 0)));
}

void release_block(unsigned index) {
  Machine& m = machine();
  Block& block = m.blocks[index];
  if (block.waiting < unsigned(m.launch.threads)) return;
  for (unsigned t = 0; t < unsigned(m.launch.threads); ++t) {
    Fibre& fibre = fibre_of(index, t);
    if (fibre.site.line != fibre_of(index, 0).site.line) m.error = "threads meet at barriers of different lines";
    fibre.value = uint64_t(block.vote);
    make_ready(fibre);
  }
  block.waiting = 0, block.vote = 0;
  if (m.random() % 4 == 0) draw_urgencies(index);
}

void release_warp(const Fibre& last) {
  uint64_t values[WARP] = {};
  const unsigned first = last.thread / WARP * WARP;
  for (unsigned i = 0; i < WARP; ++i) {
    if (!(last.mask >> i & 1)) continue;
    const Fibre& fibre = fibre_of(last.block, first + i);
    if (fibre.wait != Wait::warp || fibre.mask != last.mask) return;
    values[i] = fibre.value;
  }
  for (unsigned i = 0; i < WARP; ++i) {
    if (!(last.mask >> i & 1)) continue;
    Fibre& fibre = fibre_of(last.block, first + i);
    std::copy_n(values, WARP, fibre.seen);
    make_ready(fibre);
  }
}

void release_cluster() {
  Machine& m = machine();
  if (m.in_cluster < m.launch.threads * m.blocks.size()) return;
  m.in_cluster = 0;
  for (auto& fibre : m.fibres)
    if (fibre->block < m.blocks.size() && fibre->wait == Wait::cluster) make_ready(*fibre);
}

std::string in_vain(const char* kernel) {
  Machine& m = machine();
  std::set<std::string> found;
  for (size_t i = 0; i < m.blocks.size() * size_t(m.launch.threads); ++i) {
    const Fibre& f = *m.fibres[i];
    found.insert(WAITS[int(f.wait)] + (f.wait == Wait::forever ? "" : " at " + f.site.name()));
  }
  std::string text = std::string(kernel) + ": threads wait in vain: one";
  for (const std::string& one : found) text += (one == *found.begin() ? " " : ", another ") + one;
  return text;
}

std::unique_ptr<Fibre> new_fibre() {
  auto fibre = std::make_unique<Fibre>();
  ucontext_t& context = fibre->place.start;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre->stack.get();
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  fibre->place.started = false;
  return fibre;
}

void start(Fibre& fibre, unsigned block, unsigned thread) {
  fibre.block = block, fibre.thread = thread;
  fibre.pieces = 0;
  fibre.open.clear(), fibre.groups.clear();
  make_ready(fibre);
}

void run_cluster(const char* kernel) {
  Machine& m = machine();
  const size_t total = m.blocks.size() * size_t(m.launch.threads);
  while (m.fibres.size() < total) m.fibres.push_back(new_fibre());
  m.ready.clear(), m.in_cluster = 0;
  for (size_t i = 0; i < total; ++i)
    start(*m.fibres[i], unsigned(i) / unsigned(m.launch.threads), unsigned(i) % unsigned(m.launch.threads));
  for (unsigned block = 0; block < m.blocks.size(); ++block) draw_urgencies(block);
  for (size_t ended = 0; ended < total;) {
    if (m.ready.empty()) throw std::runtime_error(in_vain(kernel));
    Fibre& fibre = next_to_run();
    resume(fibre);
    if (fibre.wait == Wait::block) ++m.blocks[fibre.block].waiting, release_block(fibre.block);
    if (fibre.wait == Wait::warp) release_warp(fibre);
    if (fibre.wait == Wait::cluster) ++m.in_cluster, release_cluster();
    if (fibre.wait == Wait::forever) ++ended, end_thread(fibre);
    if (!m.error.empty()) throw std::runtime_error(kernel + (": " + std::exchange(m.error, "")));
  }
}

void wait_at(Wait wait, unsigned mask, Site site) {
  Fibre& fibre = *machine().current;
  fibre.wait = wait, fibre.mask = mask, fibre.site = site;
  leave();
}

bool left_out(Site site) {
  Machine& m = machine();
  const std::string name = site.name();
  m.sites.insert(name);
  return name == m.dropped;
}

void perform(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  copies.clear();
}

}  // namespace

std::string Site::name() const {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

void run(const char* kernel, const Launch& launch, const std::function<void()>& body) {
  Machine& m = machine();
  m.launch = launch;
  m.body = &body;
  gridDim = launch.grid;
  blockDim = {unsigned(launch.threads), 1, 1};
  std::vector<unsigned> clusters(launch.grid.x * launch.grid.y / unsigned(launch.cluster));
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = unsigned(i) * unsigned(launch.cluster);
  std::shuffle(clusters.begin(), clusters.end(), m.random);
  try {
    for (const unsigned first : clusters) {
      m.first_block = first;
      m.blocks.clear();
      m.blocks.resize(size_t(launch.cluster));
      run_cluster(kernel);
    }
  } catch (...) {
    m.fibres.clear();  // which wait for ever
    throw;
  }
  m.blocks.clear();
}

void* take(int64_t bytes) {
  Machine& m = machine();
  Fibre& fibre = *m.current;
  Block& block = m.blocks[fibre.block];
  if (fibre.pieces == block.pieces.size()) {
    block.taken += (bytes + 15) / 16 * 16;
    if (block.taken > m.launch.shared_bytes) fail("takes more shared memory than it was launched with");
    const auto size = size_t(std::max<int64_t>(bytes - m.short_by, 0));
    block.pieces.push_back({std::unique_ptr<char[]>(new char[size]), bytes});
    std::memset(block.pieces.back().memory.get(), 0xff, size);
  }
  const Piece& piece = block.pieces[fibre.pieces++];
  if (piece.bytes != bytes) fail("threads of a block disagree on its shared memory");
  return piece.memory.get();
}

void block_barrier(Site site) {
  if (!left_out(site)) wait_at(Wait::block, 0, site);
}

int block_barrier_or(int vote, Site site) {
  Machine& m = machine();
  m.blocks[m.current->block].vote |= vote != 0;
  wait_at(Wait::block, 1, site);
  return int(machine().current->value);
}

void warp_barrier(unsigned mask, Site site) {
  if (!left_out(site)) exchange(mask, 0, site);
}

void cluster_barrier(Site site) {
  if (!left_out(site)) wait_at(Wait::cluster, 0, site);
}

const uint64_t* exchange(unsigned mask, uint64_t value, Site site) {
  Fibre& fibre = *machine().current;
  if (!(mask >> lane() & 1)) fail("a lane that the mask does not name, at " + site.name());
  fibre.value = value;
  wait_at(Wait::warp, mask, site);
  return fibre.seen;
}

unsigned lane() { return machine().current->thread % WARP; }
unsigned cluster_rank() { return machine().current->block; }
unsigned cluster_size() { return unsigned(machine().blocks.size()); }

void* in_block_of(const void* mine, unsigned rank) {
  Machine& m = machine();
  const auto& pieces = m.blocks[m.current->block].pieces;
  const auto& others = m.blocks[rank].pieces;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const char* start = pieces[i].memory.get();
    if (mine < start || mine >= start + pieces[i].bytes) continue;
    if (i >= others.size()) fail("reads the shared memory of a block that has not started");
    return others[i].memory.get() + (static_cast<const char*>(mine) - start);
  }
  fail("asks where in another block something is that is not in shared memory");
  return nullptr;
}

// It may land at any time until it is waited for.
void copy_async(void* to, const void* from, int64_t bytes) {
  Machine& m = machine();
  const auto unaligned = [&](const void* x) { return reinterpret_cast<uintptr_t>(x) % uintptr_t(bytes) != 0; };
  if (unaligned(to) || unaligned(from)) fail("an asynchronous copy that is not aligned");
  std::memset(to, 0xff, size_t(bytes));
  std::vector<Copy> one{{to, from, bytes}};
  if (m.random() % 2) perform(one);
  else m.current->open.push_back(one[0]);
}

void commit_copies() {
  Fibre& fibre = *machine().current;
  fibre.groups.push_back(std::exchange(fibre.open, {}));
}

void wait_copies(int groups_left) {
  Fibre& fibre = *machine().current;
  for (; fibre.groups.size() > size_t(groups_left); fibre.groups.pop_front()) perform(fibre.groups.front());
}

void seed(uint64_t value) { machine().random.seed(value), machine().sites.clear(); }

std::vector<std::string> sites() { return {machine().sites.begin(), machine().sites.end()}; }

void drop(const std::string& site) { machine().dropped = site; }

void shorten(int64_t bytes) { machine().short_by = bytes; }

}  // namespace simt
