// Runs the threads of a block in turn, each until it waits for others.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

// A stack of its own, made once; contexts are switched by jumps, which unlike swapcontext leave the
// kernel alone.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  bool started = false;
  uint3 index;
};

struct Warp {
  int arrived = 0;
  int operation = 0;
  int generation = 0;
  uint64_t words[2][kLanes];  // of this operation and of the last, which some may still read
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<int> order;  // of threads
jmp_buf scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;

// Gives the other fibers their turn until somebody makes this one ready again.
void wait(State state) {
  current->state = state;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    wait(State::kDone);  // until the next block
  }
}

// Runs the fiber until it waits.
__attribute__((noinline)) void turn(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

// The order in which blocks, or the threads of one, get their turn: DST_EMULATION_ORDER.
std::vector<int> chosen_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  const char* given = std::getenv("DST_EMULATION_ORDER");
  const std::string name = given ? given : "forward";
  if (name == "reversed") {
    std::reverse(order.begin(), order.end());
  } else if (name != "forward") {
    std::shuffle(order.begin(), order.end(), std::mt19937(std::stoul(name)));
  }
  return order;
}

thread_local char anchor;  // makes this library's thread-local memory exist

// Shared memory is this library's thread-local memory: all bits set make NaN of every float type.
void fill_shared_memory() {
  *static_cast<volatile char*>(&anchor) = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & header = info->dlpi_phdr[i];
          char* begin = static_cast<char*>(info->dlpi_tls_data);
          if (header.p_type != PT_TLS || begin == nullptr) continue;
          if (&anchor < begin || &anchor >= begin + header.p_memsz) continue;
          std::memset(begin, 0xff, header.p_memsz);
          return 1;
        }
        return 0;
      },
      nullptr);
  if (anchor == 0) fail("shared memory was not found");
}

void run_block(int threads) {
  fill_shared_memory();
  warps.assign((threads + kLanes - 1) / kLanes, Warp());
  for (int i = 0; i < threads; ++i) {
    fibers[i]->state = State::kReady;
    fibers[i]->index = {static_cast<unsigned>(i), 0, 0};
  }
  for (int done = 0; done < threads;) {
    bool progress = false;
    int waiting = 0;
    done = 0;
    for (const int i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.state == State::kReady) {
        progress = true;
        turn(fiber);
      }
      done += fiber.state == State::kDone;
      waiting += fiber.state == State::kAtBarrier;
    }
    if (waiting == threads) {
      for (int i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
    } else if (!progress && done < threads) {
      fail("some threads wait for others that never come: a divergent barrier");
    }
  }
}

}  // namespace

void block_barrier() { wait(State::kAtBarrier); }

const uint64_t* exchange(int operation, uint64_t word) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  Warp& warp = warps[thread / kLanes];
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) fail("the lanes of a warp are in different operations");
  uint64_t* const words = warp.words[warp.generation % 2];
  words[lane] = word;
  if (++warp.arrived < kLanes) {
    wait(State::kInWarp);
  } else {
    warp.arrived = 0;
    ++warp.generation;
    for (int i = 0; i < kLanes; ++i) {
      fibers[thread - lane + i]->state = State::kReady;
    }
  }
  return words;
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x);
  if (threads % kLanes != 0 || block.y != 1 || block.z != 1 || grid.z != 1) {
    fail("such grids are not emulated");
  }
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  order = chosen_order(threads);
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (const int i : chosen_order(static_cast<int>(grid.x * grid.y))) {
    blockIdx = {i % grid.x, i / grid.x, 0};
    run_block(threads);
  }
}

}  // namespace emulation
