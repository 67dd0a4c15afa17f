// ops.score_antidiagonal: how much attention blocks of queries pay to blocks of keys, from sums of antidiagonals.
//
// Paper: XAttention (arXiv:2503.16428) section 2.1. One product of tiles (see antidiagonal_tile.cuh), of which only the
//   log-sum-exp of each tile of queries over each block of keys is written, for some blocks of queries at a time; a
//   second kernel turns these into shares and adds up those of a block (antidiagonal_shares.cuh). On sm_90 tiles are
//   put side by side before, but for those of 16 bits of which every block is whole, and what nobody sees of the
//   product is left out.
// Shapes: q [B, Hq, N * block, D], k [B, Hkv, S, D] 16-bit, scores [B, Hq, N, M] float32; D a multiple of 8 up to 256.
// Grids and blocks: places (N, B or 1) x 128, order 1 x 1024, the product as its kernel says, shares (blocks of the
//   part, Hq, B) x 256.
// Scratch: 4 bytes a query and a tile, and up to 256 MiB of sums (one strip of 128 tiles of queries at least); on sm_90
//   a copy of the keys, and of those queries.
// Bound by: tensor cores; 1 / (2 stride) of the products of causal attention.
#include <algorithm>

#include "antidiagonal_mma.cuh"
#include "antidiagonal_shares.cuh"
#include "antidiagonal_wgmma.cuh"

namespace hfl {
namespace antidiagonal {
namespace {

constexpr int PLACE_THREADS = 128, ORDER_THREADS = 1024;
constexpr int64_t MOST_SUMS = int64_t{256} << 20;  // bytes

// Where the queries of a block stand, from their positions; `apart`, `last` and `reach` begin as -1.
__global__ void __launch_bounds__(PLACE_THREADS) places_kernel(const Call call) {
  __shared__ int32_t tiles[MOST_TILES + 1];  // and the last query
  const int thread = static_cast<int>(threadIdx.x), block = call.a.block, n = static_cast<int>(blockIdx.x);
  wait_for_previous(thread);
  const int64_t b = blockIdx.y, line = b * call.a.blocks + n;
  const int64_t* positions = call.a.q_pos + b * call.a.q_pos_b + static_cast<int64_t>(n) * block;
  int32_t* source = call.source + line * block;
  for (int i = thread; i < block; i += PLACE_THREADS) source[i] = -1;
  for (int i = thread; i <= MOST_TILES; i += PLACE_THREADS) tiles[i] = -1;
  __syncthreads();
  int last = -1;
  bool apart = false;
  for (int i = thread; i < block; i += PLACE_THREADS) {
    const int position = static_cast<int>(max(min(positions[i], int64_t{INT32_MAX}), int64_t{-1}));
    const int within = max(position, 0) % block;
    apart = apart || position < 0 || within != i;
    if (position < 0) continue;
    source[within] = n * block + i;
    atomicMax(tiles + within / call.a.stride, position / call.a.stride);
    last = max(last, position);
  }
  last = __reduce_max_sync(0xffffffffu, last);
  if (thread % 32 == 0 && last >= 0) atomicMax(tiles + MOST_TILES, last);
  if (__syncthreads_or(apart) && thread == 0) atomicMax(call.apart, 1);
  for (int i = thread; i < call.tiles; i += PLACE_THREADS) call.tile[line * call.tiles + i] = tiles[i];
  if (thread > 0 || tiles[MOST_TILES] < 0) return;
  last = tiles[MOST_TILES];
  atomicMax(call.reach + b * strips_of(call) + n * call.tiles / ROWS, last / call.a.stride);  // a block is in one strip
  atomicMax(call.last + b, last);
}

// The pairs of works of which one sees a key, in their order: `seen`, and before them how many there are.
__global__ void __launch_bounds__(ORDER_THREADS) order_kernel(const Call call) {
  __shared__ int32_t counts[ORDER_THREADS / 32];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, pairs = call.works / PAIR;
  wait_for_previous(thread);
  int before = 0;
  for (int first = 0; first < pairs; first += ORDER_THREADS) {
    const int pair = first + thread;
    bool sees = false;
    for (int i = 0; i < PAIR && pair < pairs; ++i) {
      const Work work(call, PAIR * pair + i, COLUMNS);
      sees = sees || work.seen(call, work.reach(call)) > 0;
    }
    const uint32_t those = __ballot_sync(0xffffffffu, sees);
    if (lane == 0) counts[warp] = __popc(those);
    __syncthreads();
    const int others = counts[lane], own = lane < warp ? others : 0;
    const int place = before + __reduce_add_sync(0xffffffffu, own) + __popc(those & ((1u << lane) - 1u));
    if (sees) call.seen[1 + place] = pair;
    before += __reduce_add_sync(0xffffffffu, others);
    __syncthreads();
  }
  if (thread == 0) call.seen[0] = before;
}
static_assert(ORDER_THREADS == 32 * 32, "a warp adds up what the warps count");

const char* check(const hfl_antidiagonal& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "score_antidiagonal: expected float16 or bfloat16";
  if (a.batch < 1 || a.kv_heads < 1 || a.blocks < 1 || a.stored < 1) {
    return "score_antidiagonal: expected no empty axis";
  }
  if (a.batch > 65535 || a.q_heads > 65535) return "score_antidiagonal: expected at most 65535 rows, and heads";
  if (a.q_heads < 1 || a.q_heads % a.kv_heads) return "score_antidiagonal: expected q_heads as a multiple of kv_heads";
  if (a.dim < 8 || a.dim % 8 || a.dim > 256) {
    return "score_antidiagonal: expected a multiple of 8 channels, at most 256";
  }
  if (a.stride != 4 && a.stride != 8 && a.stride != 16 && a.stride != MOST_STRIDE) {
    return "score_antidiagonal: expected a stride of 4, 8, 16 or 32";
  }
  if (a.rounded < 0 || a.rounded > HFL_WHOLE) return "score_antidiagonal: expected a kind of rounding";
  const int tiles = a.block / a.stride;
  if (a.block != tiles * a.stride || tiles < 4 || tiles > MOST_TILES || (tiles & (tiles - 1))) {
    return "score_antidiagonal: expected a block of 4, 8, 16, 32 or 64 strides";
  }
  if (static_cast<int64_t>(a.blocks) * a.block > INT32_MAX) return "score_antidiagonal: expected fewer queries";
  const auto apart = [](const void* p, int64_t b, int64_t h, int64_t t) {
    return reinterpret_cast<uintptr_t>(p) % 16 || b % 8 || h % 8 || t % 8;
  };
  if (apart(a.q, a.q_b, a.q_h, a.q_t) || apart(a.k, a.k_b, a.k_h, a.k_t)) {
    return "score_antidiagonal: expected rows that begin at multiples of 16 bytes";
  }
  if (std::max(a.q_t, a.k_t) > INT32_MAX) return "score_antidiagonal: expected rows closer to each other";
  return nullptr;
}

// Whether tiles are put side by side on the current device.
bool packs(const hfl_antidiagonal& a) {
  if (a.rounded) return a.rounded == HFL_WHOLE ? has_wgmma<Whole>() : has_wgmma<Eight>();
  return a.dtype == HFL_BF16 ? has_wgmma<__nv_bfloat16>() : has_wgmma<__half>();
}

int64_t line_of(int64_t elements) { return (elements + 31) / 32 * 32; }

// Divides the part's product among works of some width; an error if there are too many to count.
cudaError_t cut(Call& call, int columns) {
  const int group = call.a.q_heads / call.a.kv_heads;
  call.strips = (call.rows - 1) / ROWS + 1;
  call.together = std::min(TOGETHER, (group * call.strips + 1) / PAIR * PAIR);
  call.widths = (call.columns - 1) / columns + 1;
  const int64_t rounds = (static_cast<int64_t>(group) * call.strips - 1) / call.together + 1;
  const int64_t works = rounds * call.together * call.widths * call.a.batch * call.a.kv_heads;
  call.works = works < INT32_MAX / 2 ? static_cast<int32_t>(works) : 0;
  return call.works ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// The call with its scratch laid out, in units of 4 bytes, for the current device; returns bytes of scratch.
int64_t lay_out(const hfl_antidiagonal& a, Call& call) {
  call.a = a;
  call.tiles = a.block / a.stride;
  call.columns = (a.stored - 1) / a.stride + 1;
  call.key_blocks = (a.stored - 1) / a.block + 1;
  const int64_t alike = a.q_pos_b ? a.batch : 1, all = static_cast<int64_t>(a.blocks) * call.tiles;
  const int64_t strip = int64_t{4} * ROWS * a.batch * a.q_heads * call.key_blocks;
  const int64_t rows = std::min(all, std::max<int64_t>(1, MOST_SUMS / strip) * ROWS);
  call.first = 0, call.rows = static_cast<int32_t>(rows);
  call.padded = (call.columns - 1) / COLUMNS * COLUMNS + COLUMNS;
  int64_t used = 0;
  const auto take = [&](int64_t words) {
    const int64_t from = used;
    used += line_of(words);
    return static_cast<int32_t*>(a.scratch) + from;
  };
  call.lies = !a.rounded && a.dim % DEEP == 0 && a.stored % a.stride == 0;
  call.apart = take(1);
  call.last = take(alike);
  call.reach = take(alike * strips_of(call));
  call.source = take(alike * a.blocks * a.block);
  call.tile = take(alike * all);
  call.seen = nullptr;
  const int64_t lines = rows * a.batch * a.q_heads, columns = int64_t{call.padded} * a.batch * a.kv_heads;
  call.sums = reinterpret_cast<float*>(take(lines * call.key_blocks));
  call.queries = call.keys = nullptr;
  if (packs(a)) {
    const int64_t words = int64_t{a.stride} * a.dim / (a.rounded ? 4 : 2);
    call.query_sizes = reinterpret_cast<float*>(take(a.rounded ? lines : 0));
    call.key_sizes = reinterpret_cast<float*>(take(a.rounded ? columns : 0));
    call.queries = reinterpret_cast<char*>(take(lines * words));
    call.keys = reinterpret_cast<char*>(take(columns * words));
    static_cast<void>(cut(call, COLUMNS));  // `multiply` says so where they are too many
    call.seen = take(call.works / PAIR + 1);
  }
  return 4 * used;
}

// The product of a part, of T in the precision of F.
template <typename T, typename F>
cudaError_t multiply(Call& call, cudaStream_t stream) {
  using W = Warps<T>;
  cudaError_t error = cut(call, call.queries ? COLUMNS : W::COLUMNS);
  if (error != cudaSuccess) return error;
  if (call.queries) {
    error = follow(order_kernel, 1, ORDER_THREADS, call, stream);
    return error == cudaSuccess ? launch_wgmma<T, F>(call, stream) : error;
  }
  const size_t bytes = W::bytes(call.a.stride);
  error = cudaFuncSetAttribute(mma_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  mma_kernel<T><<<static_cast<unsigned>(call.works), W::THREADS, bytes, stream>>>(call);
  return cudaGetLastError();
}

template <typename T, typename F>
cudaError_t run(Call& call, cudaStream_t stream) {
  const hfl_antidiagonal& a = call.a;
  const int alike = a.q_pos_b ? a.batch : 1, all = a.blocks * call.tiles, most = call.rows;
  Maps maps;
  call.lies = call.lies && call.queries && map_lying<F>(maps, call);
  const size_t cleared = static_cast<size_t>(reinterpret_cast<char*>(call.source) - static_cast<char*>(a.scratch));
  cudaError_t error = cudaMemsetAsync(a.scratch, 0xff, cleared, stream);  // `apart`, `last` and `reach`
  if (error != cudaSuccess) return error;
  error = follow(places_kernel, dim3(a.blocks, alike), PLACE_THREADS, call, stream);
  if (error == cudaSuccess && call.queries) error = pack<T, F, false>(call, stream);
  for (; error == cudaSuccess && call.first < all; call.first += most) {
    call.rows = std::min(most, all - call.first);
    error = multiply<T, F>(call, stream);
    if (error == cudaSuccess) error = add_up(call, stream);
  }
  return error;
}

template <typename T>
cudaError_t run(Call& call, cudaStream_t stream) {
  if (!call.a.rounded) return run<T, T>(call, stream);
  return call.a.rounded == HFL_WHOLE ? run<T, Whole>(call, stream) : run<T, Eight>(call, stream);
}

}  // namespace
}  // namespace antidiagonal
}  // namespace hfl

extern "C" int64_t hfl_antidiagonal_scratch(const hfl_antidiagonal* a) {
  hfl::antidiagonal::Call call;
  return hfl::antidiagonal::check(*a) ? 0 : hfl::antidiagonal::lay_out(*a, call);
}

extern "C" const char* hfl_antidiagonal_cuda(const hfl_antidiagonal* a) {
  const char* message = hfl::antidiagonal::check(*a);
  if (message) return message;
  hfl::antidiagonal::Call call;
  hfl::antidiagonal::lay_out(*a, call);
  if (a->rounded && !call.queries) return "score_antidiagonal: expected a device of sm_90 for tiles of 8 bits";
  const auto stream = static_cast<cudaStream_t>(a->stream);
  const cudaError_t error = a->dtype == HFL_BF16 ? hfl::antidiagonal::run<__nv_bfloat16>(call, stream)
                                                 : hfl::antidiagonal::run<__half>(call, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
