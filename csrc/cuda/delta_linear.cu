// ops.delta_linear: each row of x times the signs of its slots, added to what the base layer gives.
//
// Paper: BitDelta, arXiv 2402.10193. Shapes: x [R, K], bits [S, N, K / 32], out [R, N]; any R, K a multiple of 128.
// Few rows have a launch of their own (delta_few.cuh). Of many, two launches: the first makes digits of x
//   (delta_rows.cuh), a block for a row, and one that sorts the rows into pieces of at most 8 that have the same slots.
//   Blocks of the second take one item after the other, 128 outputs of a piece: so the bits of a slot are read once for
//   its rows, and rows may have any slots in any order.
// Block: 256 threads, 32 outputs x half of the inputs for each warp. Shared memory: four stages of 1024 inputs, 16 KiB
//   of bits and up to 24 KiB of digits, of which three are on their way; and the sums of an item.
// Signs stay bits: `word & 0x10101010` is four bytes of 16 or 0, as a tensor core multiplies them, so that an
//   instruction unpacks four weights; the four places of a half byte have sums of their own. What is multiplied are
//   digits of x, whole numbers, summed up exactly: so a row's result depends on nothing but the row.
//   Then sum(+-x) = 2 sum(x where 1) - sum(x).
// Bound by: the bytes of the bits while pieces are short; tensor cores where they are full.
#include <algorithm>

#include "delta_few.cuh"

namespace hfl {
namespace {

__global__ void __launch_bounds__(ROW_THREADS) delta_rows_kernel(const hfl_delta a, const DeltaRows to, int most) {
  extern __shared__ int kinds[];
  wait_for_previous(most);
  const int row = static_cast<int>(blockIdx.x) - 1;
  if (row < 0) {
    sort_rows(a, to, most, kinds, kinds + a.slots + 2);
  } else {
    write_digits(a, to, row);
  }
}

// A warp's part of a step.
template <int TILES, bool GROUPED>
__device__ __forceinline__ void work_on(Sums& sums, float (&scaled)[2][MOST_TILES][4], uint4 (&digits)[MOST_TILES][2],
                                        const hfl_delta& a, const DeltaRows& of, const DeltaStep& s, int tiles,
                                        uint32_t stage) {
  const int outputs = warp_of_thread() % 4 * 32, used = s.rows * DIGITS;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int unit = warp_of_thread() / 4 * 4 + i;
    multiply<TILES>(sums, digits, stage + static_cast<uint32_t>(outputs * 128), stage + BITS_BYTES, unit, used);
    if (GROUPED) {
      scale_block<TILES>(scaled, sums, a, of, s, s.item % tiles * OUTPUTS + outputs, s.chunk * 8 + unit, used);
    }
  }
}

// The results of a plane, added to what a thread has: of output thread % 128, of every other row.
template <bool GROUPED>
__device__ __forceinline__ void collect(float (&own)[OWN], Sums& sums, float (&scaled)[2][MOST_TILES][4], float* board,
                                        const hfl_delta& a, const DeltaRows& of, const DeltaStep& s, int tiles) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread(), width = tiles_of(s.rows) * 8 + 1;
  float* to = board + (warp_of_thread() / 4 * OUTPUTS + warp_of_thread() % 4 * 32 + lane / 4) * width + lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < MOST_TILES; ++t) {
    if (t * 8 >= width - 1) break;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = GROUPED ? scaled[m][t][i] : static_cast<float>(2 * gathered(sums[m][t], i));
        to[(m * 16 + i / 2 * 8) * width + t * 8 + i % 2] = sum;
        scaled[m][t][i] = 0.0f;
      }
  }
  clear<MOST_TILES>(sums);
  __syncthreads();
  const int output = min(s.item % tiles * OUTPUTS + thread % OUTPUTS, a.outputs - 1);
  float scale = 1.0f;
  if (!GROUPED) scale = a.scales[static_cast<int64_t>(s.slot) * a.scale_rows + (a.scale_rows > 1 ? output : 0)];
#pragma unroll
  for (int j = 0; j < OWN; ++j) {
    const int i = thread / OUTPUTS + 2 * j;
    if (i >= s.rows) break;
    const int64_t row = of.order[s.first + i];
    float sum = 0.0f;
#pragma unroll
    for (int d = DIGITS - 1; d >= 0; --d) {
      const float* at = board + thread % OUTPUTS * width + i * DIGITS + d;
      const float digit = at[0] + at[OUTPUTS * width];
      sum = fmaf(sum, 256.0f, GROUPED ? digit : digit - of.totals[row * DIGITS + d]);
    }
    own[j] = fmaf(sum * of.units[row], scale, own[j]);
  }
}

// What a thread needs of `base` for an item, and what it leaves of it.
template <typename Do>
__device__ __forceinline__ void each_result(const hfl_delta& a, const DeltaRows& of, const DeltaStep& s, int tiles,
                                            Do act) {
  const int thread = static_cast<int>(threadIdx.x), output = s.item % tiles * OUTPUTS + thread % OUTPUTS;
#pragma unroll
  for (int j = 0; j < OWN; ++j) {
    const int i = thread / OUTPUTS + 2 * j;
    if (i < s.rows && output < a.outputs) act(j, static_cast<int64_t>(of.order[s.first + i]), output);
  }
}

template <bool GROUPED>
__global__ void __launch_bounds__(DELTA_THREADS, 1)
    delta_kernel(const hfl_delta a, const DeltaRows of, int piece, int tiles) {
  extern __shared__ __align__(128) unsigned char shared[];
  wait_for_previous(piece);
  const int64_t items = static_cast<int64_t>(*of.pieces) * tiles;
  const int first = static_cast<int>(items * blockIdx.x / gridDim.x),
            end = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x);
  if (first == end) return;
  const int bytes = stage_bytes(piece), chunks = of.padded / CHUNK;
  const uint32_t stages = shared_address(shared);
  float* board = reinterpret_cast<float*>(shared + STAGES * bytes);
  DeltaStep now, ahead;
  now.begin(a, of, tiles, first);
  ahead = now;
  bool more = true;
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) {
    if (more)
      fetch(ahead, a, of, tiles, stages + static_cast<uint32_t>(i * bytes)),
          more = advance(ahead, a, of, tiles, chunks, end);
    copy_commit();
  }
  Sums sums;
  clear<MOST_TILES>(sums);
  float scaled[2][MOST_TILES][4] = {}, own[OWN] = {};
  uint4 digits[MOST_TILES][2] = {};
  uint16_t base[OWN] = {};
  bool fresh = true;
#pragma unroll 1
  for (int step = 0; now.item < end; ++step) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    if (more) {
      fetch(ahead, a, of, tiles, stages + static_cast<uint32_t>((step + STAGES - 1) % STAGES * bytes));
      more = advance(ahead, a, of, tiles, chunks, end);
    }
    copy_commit();
    if (fresh) {
      each_result(a, of, now, tiles, [&](int j, int64_t row, int output) {
        base[j] = static_cast<const uint16_t*>(a.base)[row * a.base_r + output];
      });
    }
    const uint32_t stage = stages + static_cast<uint32_t>(step % STAGES * bytes);
    const int columns = tiles_of(now.rows);
    if (now.has_bits(a)) {
      if (columns == 1) work_on<1, GROUPED>(sums, scaled, digits, a, of, now, tiles, stage);
      if (columns == 2) work_on<2, GROUPED>(sums, scaled, digits, a, of, now, tiles, stage);
      if (columns == 3) work_on<3, GROUPED>(sums, scaled, digits, a, of, now, tiles, stage);
    }
    const DeltaStep done = now;
    advance(now, a, of, tiles, chunks, end);
    fresh = now.item != done.item;
    if (done.has_bits(a)) {
      if (fresh || now.plane != done.plane) collect<GROUPED>(own, sums, scaled, board, a, of, done, tiles);
    } else if (done.slot >= a.slots) {
#pragma unroll
      for (int j = 0; j < OWN; ++j) own[j] = __int_as_float(0x7fffffff);  // there is no such slot
    }
    if (!fresh) continue;
    each_result(a, of, done, tiles, [&](int j, int64_t row, int output) {
      const uint16_t sum = from_float(own[j] + to_float(base[j], a.dtype), a.dtype);
      static_cast<uint16_t*>(a.out)[row * a.outputs + output] = done.plane < a.planes ? sum : base[j];
      own[j] = 0.0f;
    });
  }
}

const char* check(const hfl_delta& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "delta_linear: expected float16 or bfloat16";
  if (a.rows < 1 || a.outputs < 1 || a.slots < 1 || a.planes < 1) return "delta_linear: expected no empty axis";
  if (a.inputs < BLOCK || a.inputs % BLOCK || a.inputs > 65536) {
    return "delta_linear: expected a multiple of 128 inputs, at most 65536";
  }
  if (a.groups < 1 || a.inputs / BLOCK % a.groups) return "delta_linear: expected groups of a multiple of 128 inputs";
  if (a.slots > 4096) return "delta_linear: expected at most 4096 slots";
  if (a.scale_rows != 1 && a.scale_rows != a.outputs)
    return "delta_linear: expected a scale for each output, or for all";
  const int64_t tiles = (static_cast<int64_t>(a.outputs) + OUTPUTS - 1) / OUTPUTS;
  if (tiles * a.rows > INT32_MAX - 65536) return "delta_linear: expected fewer than 2^31 tiles of results";
  for (const void* x : {a.x, static_cast<const void*>(a.bits)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16)
      return "delta_linear: expected tensors that begin at multiples of 16 bytes";
  }
  return a.x_r % 8 ? "delta_linear: expected rows that begin at multiples of 16 bytes" : nullptr;
}

// The multiprocessors of the current device, and the shared memory of a block.
cudaError_t look(int& processors, int& bytes) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return error;
}

// The launch for few rows, where there is shared memory for their digits.
bool takes_few(const hfl_delta& a, int processors, int bytes, FewTask& task, int& blocks, int& threads) {
  if (a.rows > FEW_ROWS) return false;
  task = {a, (a.outputs - 1) / FEW_OUTPUTS + 1, (a.inputs + CHUNK - 1) / CHUNK * CHUNK, 0};
  bytes -= static_cast<int>(sizeof(FewBoard)) + 1024;
  for (int warps = FEW_WARPS; warps >= FEW_WARPS / 4; warps /= 2) {
    for (task.room = std::min(a.rows, FEW_LOCAL); task.room && task.bytes(warps, task.room) > bytes;) --task.room;
    if (task.room < std::min(a.rows, FEW_PIECE)) continue;
    blocks = static_cast<int>(std::min<int64_t>(int64_t{a.rows} * task.tiles, processors)), threads = warps * 32;
    return true;
  }
  return false;
}

cudaError_t run_few(FewTask& task, int blocks, int threads) {
  const void* kernel = task.a.groups > 1 ? reinterpret_cast<const void*>(&delta_few_kernel<true>)
                                         : reinterpret_cast<const void*>(&delta_few_kernel<false>);
  const int bytes = static_cast<int>(task.bytes(threads / 32, task.room));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&task};
  return launch(kernel, static_cast<unsigned>(blocks), threads, static_cast<size_t>(bytes), task.a.stream, arguments);
}

cudaError_t run(const hfl_delta& a) {
  int processors = 0, bytes = 0, blocks = 0, threads = 0;
  cudaError_t error = look(processors, bytes);
  if (error != cudaSuccess) return error;
  FewTask few;
  if (takes_few(a, processors, bytes, few, blocks, threads)) return run_few(few, blocks, threads);
  int piece = MOST_PIECE, tiles = (a.outputs + OUTPUTS - 1) / OUTPUTS;
  while (piece > 2 && delta_shared(piece) > bytes) --piece;
  DeltaRows rows(a);
  hfl_delta task = a;
  void* arguments[] = {&task, &rows, &piece, &tiles};
  const size_t kinds = static_cast<size_t>(a.slots + 2) * 2 * sizeof(int);
  error = launch(reinterpret_cast<const void*>(&delta_rows_kernel), static_cast<unsigned>(a.rows) + 1, ROW_THREADS,
                 kinds, a.stream, arguments);
  if (error != cudaSuccess) return error;
  const void* kernel = a.groups > 1 ? reinterpret_cast<const void*>(&delta_kernel<true>)
                                    : reinterpret_cast<const void*>(&delta_kernel<false>);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, delta_shared(piece));
  if (error != cudaSuccess) return error;
  const int64_t items = static_cast<int64_t>(a.rows) * tiles;
  return launch(kernel, static_cast<unsigned>(std::min<int64_t>(items, processors)), DELTA_THREADS,
                static_cast<size_t>(delta_shared(piece)), a.stream, arguments);
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_delta_scratch(const hfl_delta* a) { return hfl::DeltaRows(*a).bytes; }

extern "C" const char* hfl_delta_cuda(const hfl_delta* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const cudaError_t error = hfl::run(*a);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
