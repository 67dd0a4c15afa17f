// ops.linear_of_rows: each of up to 16 rows times the matrix of its tenant, in 16 bits or in int8.
//
// Shapes: x [R, K], weight [N, K] of each table, out [R, W]; K a multiple of 64.
// Grid: two blocks for each multiprocessor, which have a run of items: 128 outputs of a piece, up to 8 rows of the same
//   table. Block: 8 warps, of which each takes 16 outputs and all inputs. Shared memory: the rows of a piece.
// Weights go straight into registers as they lie, one batch of 4 KiB of a warp ahead; a lane has the same inputs of
//   weights and of x, so that a tensor core multiplies them in whatever order they are. int8 is exact in 16 bits: so
//   codes become floats in registers, and scales come last.
// A row's result does not depend on the others: it has a column of the product of its own, summed up in order.
// Bound by: the bytes of the weights.
#include "../tables.h"

#include <algorithm>

#include "delta_rows.cuh"

namespace hfl {
namespace {

constexpr int TABLE_WARPS = 8, TABLE_THREADS = TABLE_WARPS * 32, PIECE = 8, OUT = 16, AHEAD = 4;
constexpr int MOST_BYTES = 110 << 10;  // of shared memory, so that two blocks fit

struct TablesTask {
  hfl_tables a;
  int32_t pieces, tiles;                 // tiles: of TABLE_WARPS * OUT outputs, of the width
  int32_t order[HFL_TABLES_ROWS];        // rows, those of a piece side by side
  int32_t starts[HFL_TABLES_ROWS + 1];  // where pieces begin in it

  explicit TablesTask(const hfl_tables& a_)
      : a(a_), pieces(0), tiles((a_.width - 1) / (TABLE_WARPS * OUT) + 1), order(), starts() {
    const int most = std::min<int>(PIECE, MOST_BYTES / row_bytes());
    int placed = 0;
    for (int table = 0; table < a.tables; ++table) {
      for (int row = 0, held = 0; row < a.rows; ++row) {
        if (a.table_of_row[row] != table) continue;
        if (held++ % most == 0) starts[pieces++] = placed;
        order[placed++] = row;
      }
    }
    starts[pieces] = placed;
  }
  __host__ __device__ int row_bytes() const { return a.inputs * 2 + 16; }
};

// Four codes as pairs of floats of 16 bits. As bfloat16, 0x43 over seven bits of a code is 128 more than these, and
// over its sign 128 or 256; as float16, 0x64 over a byte is 1024 more.
template <bool BF16>
__device__ __forceinline__ uint2 floats_of(uint32_t codes) {
  if (BF16) {
    const uint32_t low = __byte_perm(codes, 0x43434343u, 0x4140), high = __byte_perm(codes, 0x43434343u, 0x4342);
    return make_uint2(subtract_bf16(low & 0xff7fff7fu, low & 0xff80ff80u),
                      subtract_bf16(high & 0xff7fff7fu, high & 0xff80ff80u));
  }
  const uint32_t moved = codes ^ 0x80808080u;
  return make_uint2(subtract_f16(__byte_perm(moved, 0x64646464u, 0x4140), 0x64806480u),
                    subtract_f16(__byte_perm(moved, 0x64646464u, 0x4342), 0x64806480u));
}

template <bool BF16>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint4& weights, uint32_t low, uint32_t high) {
  if (BF16) {
    mma_bf16(sums, weights, low, high);
  } else {
    mma_f16(sums, weights, low, high);
  }
}

// What a warp does of a piece. A unit is 16 bytes of four lanes: 32 inputs, or 64 where they are EIGHT bits.
template <bool BF16, bool EIGHT>
struct TablesWarp {
  static constexpr int UNIT = EIGHT ? 64 : 32;
  struct Batch {
    uint4 weights[AHEAD][2];
  };
  const TablesTask& p;
  const char* weight;
  const float* scales;
  int outputs, lane, units, batches;
  uint32_t x;  // this lane's first inputs, of row g of the piece

  __device__ __forceinline__ TablesWarp(const TablesTask& p_, int piece, uint32_t rows_at)
      : p(p_), lane(lane_of_thread()), units(p_.a.inputs / UNIT), batches((units + AHEAD - 1) / AHEAD) {
    const int table = p.a.table_of_row[p.order[p.starts[piece]]], g = lane / 4, row = g / 2 + g % 2 * 4;
    weight = static_cast<const char*>(p.a.weight[table]), scales = p.a.scales[table], outputs = p.a.outputs[table];
    const int there = row < p.starts[piece + 1] - p.starts[piece] ? row : 0;  // the others' sums are left alone
    x = rows_at + static_cast<uint32_t>(there * p.row_bytes() + lane % 4 * (UNIT / 2));
  }

  __device__ __forceinline__ void load(Batch& to, int tile, int batch, bool there) const {
    const int row_bytes = p.a.inputs * (EIGHT ? 1 : 2), first = tile * OUT,
              output = min(first + lane / 4, outputs - 1), on = min(8, outputs - 1 - output);
    const char* from = weight + static_cast<int64_t>(output) * row_bytes + batch * (AHEAD * 64) + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        to.weights[i][h] =
            load_once(from + i * 64 + h * on * row_bytes, there && first < outputs && batch * AHEAD + i < units);
      }
  }

  // Products with a batch. Lane 4 g + t has the t-th quarter of each unit, of outputs g and g + 8.
  __device__ __forceinline__ void multiply(float (&sums)[4], const Batch& own, int batch) const {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (batch * AHEAD + i >= units) break;
      const uint4 w = own.weights[i][0], v = own.weights[i][1];
      const uint32_t at = x + static_cast<uint32_t>((batch * AHEAD + i) * UNIT * 2);
      const uint4 a = load_shared(at);
      if (EIGHT) {
        const uint4 b = load_shared(at + 16);
        multiply_codes(sums, w.x, v.x, a.x, a.y), multiply_codes(sums, w.y, v.y, a.z, a.w);
        multiply_codes(sums, w.z, v.z, b.x, b.y), multiply_codes(sums, w.w, v.w, b.z, b.w);
      } else {
        multiply_add<BF16>(sums, make_uint4(w.x, v.x, w.y, v.y), a.x, a.y);
        multiply_add<BF16>(sums, make_uint4(w.z, v.z, w.w, v.w), a.z, a.w);
      }
    }
  }
  __device__ __forceinline__ static void multiply_codes(float (&sums)[4], uint32_t w, uint32_t v, uint32_t low,
                                                        uint32_t high) {
    const uint2 upper = floats_of<BF16>(w), lower = floats_of<BF16>(v);
    multiply_add<BF16>(sums, make_uint4(upper.x, lower.x, upper.y, lower.y), low, high);
  }
  __device__ __forceinline__ static uint4 load_shared(uint32_t at) {
    uint4 y;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w) : "r"(at));
    return y;
  }

  __device__ __forceinline__ void write(const float (&sums)[4], const float (&scale)[2], int piece, int tile) const {
    const int first = p.starts[piece], rows = p.starts[piece + 1] - first;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = lane % 4 + j % 2 * 4, output = tile * OUT + j / 2 * 8 + lane / 4;
      if (row >= rows || output >= p.a.width) continue;
      const float value = output >= outputs ? NOTHING : EIGHT ? sums[j] * scale[j / 2] : sums[j];
      static_cast<uint16_t*>(p.a.out)[static_cast<int64_t>(p.order[first + row]) * p.a.width + output] =
          from_float(value, p.a.dtype);
    }
  }

  // Tiles of a block, from one up to another.
  __device__ __forceinline__ void run(int piece, int from, int until) const {
    Batch one, other;
    load(one, from * TABLE_WARPS + warp_of_thread(), 0, true);
#pragma unroll 1
    for (int block = from; block < until; ++block) {
      const int tile = block * TABLE_WARPS + warp_of_thread();
      float sums[4] = {}, scale[2] = {};
      if (EIGHT) {
#pragma unroll
        for (int h = 0; h < 2; ++h) scale[h] = scales[min(tile * OUT + h * 8 + lane / 4, outputs - 1)];
      }
#pragma unroll 1
      for (int batch = 0; batch < batches; batch += 2) {
        load(other, tile, batch + 1, true);
        multiply(sums, one, batch);
        const bool more = batch + 2 < batches;
        load(one, more ? tile : tile + TABLE_WARPS, more ? batch + 2 : 0, more || block + 1 < until);
        multiply(sums, other, batch + 1);
      }
      write(sums, scale, piece, tile);
    }
  }
};

template <bool BF16>
__global__ void __launch_bounds__(TABLE_THREADS, 2) tables_kernel(const __grid_constant__ TablesTask p) {
  extern __shared__ __align__(16) unsigned char rows[];
  const int64_t items = static_cast<int64_t>(p.pieces) * p.tiles, end = items * (blockIdx.x + 1) / gridDim.x;
  int64_t item = items * blockIdx.x / gridDim.x;
  wait_for_previous(static_cast<int>(item));
#pragma unroll 1
  while (item < end) {
    const int piece = static_cast<int>(item / p.tiles), from = static_cast<int>(item % p.tiles),
              until = static_cast<int>(min(static_cast<int64_t>(p.tiles), from + end - item));
    const int first = p.starts[piece], each = p.a.inputs / 8;
    __syncthreads();  // nobody reads the rows of the piece before
    for (int i = static_cast<int>(threadIdx.x); i < (p.starts[piece + 1] - first) * each; i += TABLE_THREADS) {
      const uint16_t* x = static_cast<const uint16_t*>(p.a.x) + p.order[first + i / each] * p.a.x_r;
      copy_async(rows + i / each * p.row_bytes() + i % each * 16, x + i % each * 8, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    if (p.a.scales[p.a.table_of_row[p.order[first]]]) {
      TablesWarp<BF16, true>(p, piece, shared_address(rows)).run(piece, from, until);
    } else {
      TablesWarp<BF16, false>(p, piece, shared_address(rows)).run(piece, from, until);
    }
    item += until - from;
  }
}

const char* check(const hfl_tables& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "linear_of_rows: expected float16 or bfloat16";
  if (a.rows < 1 || a.rows > HFL_TABLES_ROWS || a.tables < 1 || a.tables > HFL_TABLES_ROWS)
    return "linear_of_rows: expected 1 to 16 rows, and as many tables";
  if (a.inputs < 64 || a.inputs % 64 || a.inputs * 2 + 16 > MOST_BYTES)
    return "linear_of_rows: expected a multiple of 64 inputs, at most 56256";
  if (a.width < 1 || a.x_r % 8 || reinterpret_cast<uintptr_t>(a.x) % 16)
    return "linear_of_rows: expected outputs, and rows that begin at multiples of 16 bytes";
  for (int row = 0; row < a.rows; ++row) {
    if (a.table_of_row[row] < 0 || a.table_of_row[row] >= a.tables) return "linear_of_rows: expected tables that are there";
  }
  for (int table = 0; table < a.tables; ++table) {
    if (a.outputs[table] < 1 || a.outputs[table] > a.width) return "linear_of_rows: expected outputs up to the width";
    if (!a.weight[table] || reinterpret_cast<uintptr_t>(a.weight[table]) % 16)
      return "linear_of_rows: expected weights that begin at multiples of 16 bytes";
  }
  return nullptr;
}

cudaError_t run(const hfl_tables& a) {
  TablesTask task(a);
  int device = 0, processors = 0, most = 0;
  for (int piece = 0; piece < task.pieces; ++piece) most = std::max(most, task.starts[piece + 1] - task.starts[piece]);
  const int bytes = most * task.row_bytes();
  const void* kernel = a.dtype == HFL_BF16 ? reinterpret_cast<const void*>(&tables_kernel<true>)
                                           : reinterpret_cast<const void*>(&tables_kernel<false>);
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t items = static_cast<int64_t>(task.pieces) * task.tiles;
  void* arguments[] = {&task};
  return launch(kernel, static_cast<unsigned>(std::min<int64_t>(items, 2 * processors)), TABLE_THREADS,
                static_cast<size_t>(bytes), a.stream, arguments);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_tables_cuda(const hfl_tables* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const cudaError_t error = hfl::run(*a);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
