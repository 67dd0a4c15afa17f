// ops.pick_blocks with `take`: the forced blocks of each row of scores and the best candidates, ascending.
//
// Paper: the top-k of Quest (arXiv:2406.10774) section 3.3. The least score that is taken is found with a histogram of
// 2048 bins over the range of the scores, then, if just few share a bin with it, among those, else with finer bins of
// that bin; of candidates with just that score the first are taken, as blocks are counted off in order. NaN counts as
// -inf, as in the definition.
// Shapes: scores [B, Hs, N, M] float32, M to 2^31; ids [B, Hs, N, K] int32.
// Grid: (B * Hs * N): a row each. Block: 512 threads.
// Shared memory: 9 KiB, and 4 bytes a block where they fit (54 K of them on sm_90); where they do not, each pass reads
//   the scores again from the L2. Bound by: latency of one load and of about ten barriers.
#include <atomic>

#include "../hf_longctx.h"
#include "divide.cuh"
#include "pick_row.cuh"
#include "step.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 512;

struct PickTask {
  hfl_pick a;
  Divisor queries, heads;
  bool held;  // ranks fit into shared memory
  PickTurn turn;
};

__global__ void __launch_bounds__(THREADS, 1) pick_kernel(const __grid_constant__ PickTask p) {
  extern __shared__ __align__(16) uint32_t ranks_of_row[];
  __shared__ __align__(16) Pick<THREADS>::Room room;
  Pick<THREADS>::clear(room);
  const hfl_pick& a = p.a;
  const int row = static_cast<int>(blockIdx.x), line = p.queries.divide(row), n = row - line * a.queries;
  const int b = p.heads.divide(line);
  begin_turn(p.turn.turn, b | n);
  if (p.turn.scored) {
    if (threadIdx.x == 0) {
      wait_until(p.turn.scored + row, p.turn.blocks);
      p.turn.scored[row] = 0;
    }
    __syncthreads();
  }
  Pick<THREADS>::row(a, row, b, n, p.held ? ranks_of_row : nullptr, room);
  if (p.turn.picked) say_picked(p.turn.picked + row, p.turn.readers);
  end_turn(p.turn.turn);
}

// Bytes of dynamic shared memory that the current device allows the kernel, which it is then allowed.
cudaError_t room_on_device(int& bytes) {
  static std::atomic<int> known[MOST_DEVICES];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  bytes = device < MOST_DEVICES ? known[device].load(std::memory_order_acquire) : 0;
  if (bytes) return cudaSuccess;
  cudaFuncAttributes of_kernel;
  error = cudaFuncGetAttributes(&of_kernel, pick_kernel);
  int most = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  bytes = (most - static_cast<int>(of_kernel.sharedSizeBytes)) / 128 * 128;
  error = cudaFuncSetAttribute(pick_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < MOST_DEVICES) known[device].store(bytes, std::memory_order_release);
  return error;
}

const char* check(const hfl_pick& a) {
  if (a.batch < 1 || a.heads < 1 || a.queries < 1 || a.blocks < 0 || a.chosen < 0) {
    return "pick_blocks: expected no empty axis";
  }
  if (static_cast<int64_t>(a.batch) * a.heads * a.queries > INT32_MAX) return "pick_blocks: expected fewer rows";
  return a.sink < 0 || a.take < 0 ? "pick_blocks: expected sink and take of at least 0" : nullptr;
}

}  // namespace

const char* wrong_pick(const hfl_pick& a) { return check(a); }

const char* pick_in_turn(const hfl_pick& a, const PickTurn& turn) {
  const char* message = check(a);
  if (message) return message;
  if (a.chosen == 0) return nullptr;
  int room = 0;
  cudaError_t error = room_on_device(room);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t wanted = (static_cast<int64_t>(a.blocks) + EACH - 1) / EACH * EACH * 4;
  PickTask task = {a, Divisor(a.queries), Divisor(a.heads), wanted <= room, turn};
  const unsigned rows =
      static_cast<unsigned>(a.batch) * static_cast<unsigned>(a.heads) * static_cast<unsigned>(a.queries);
  void* arguments[] = {&task};
  error = launch(reinterpret_cast<const void*>(&pick_kernel), dim3(rows), THREADS,
                 task.held ? static_cast<size_t>(wanted) : 0, a.stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl

extern "C" int64_t hfl_pick_scratch(const hfl_pick*) { return 0; }

extern "C" const char* hfl_pick_cuda(const hfl_pick* a) { return hfl::pick_in_turn(*a, hfl::PickTurn()); }
