// How the kernels of ops.attend_layer hand over: row by row, through counters in global memory, not kernel by kernel.
//
// The first kernel of a step waits for all that came before it (`wait_for_previous`), and only then is the next one set
// up. Each of the others is set up once all blocks of the one before it run or are done, so what it waits for is always
// on its way, and no block that waits can be in the way of one that works. Where kernels cannot follow each other like
// that, they come one after the other, and all that they wait for is there.
// Counters are zero before and after a step, and so are scores that are chosen from where they are read, each of which is
// there once it is not 0. In the end each kernel waits for the one before it, which is done by then:
// whoever waits for the last one has waited for all.
#pragma once
#include "../hf_longctx.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {

constexpr int MOST_HEADS = 128;  // KV heads of a layer

// Which KV head of the layer each one of a group is.
struct Heads {
  bool mapped = false;
  uint8_t at[MOST_HEADS] = {};
#ifdef __CUDACC__
  __device__ __forceinline__ int of(int head) const { return mapped ? at[head] : head; }
#endif
};

enum class Turn { alone, first, later };  // of a kernel: outside a step, and in it

// Read a kernel's arguments once, a line of them a time, by all warps: else each line is waited for where it is needed.
template <typename P>
__device__ __forceinline__ void touch(const P& arguments) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const uint64_t base = __cvta_generic_to_grid_constant(&arguments);
#pragma unroll 1
  for (int line = warp; line * 64 < static_cast<int>(sizeof(P)); line += warps) {
    uint32_t x;
    asm volatile("ld.param.u32 %0, [%1];" : "=r"(x) : "l"(base + line * 64));
  }
}

// Let the next kernel be set up.
__device__ __forceinline__ void let_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Comes where `wait_for_previous` does.
__device__ __forceinline__ void begin_turn(Turn turn, int prepared) {
  if (turn != Turn::later) {
    wait_for_previous(prepared);
  } else {
    let_next();
  }
}

// The last that a block does.
__device__ __forceinline__ void end_turn(Turn turn) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (turn == Turn::later) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Until a counter has reached `least`; by one thread. What never comes, our own mistake, is an error after some seconds.
__device__ __forceinline__ void wait_until(const int* counter, int least) {
#pragma unroll 1
  for (int polls = 0; load_in_order(counter) < least; ++polls) {
    if (polls == 1 << 24) __trap();
  }
}

// What a kernel of a step waits for and says; nullptr: nothing.
struct ScoreTurn {
  Turn turn = Turn::alone;
  Heads heads;
  int* scored = nullptr;  // [B * Hs], blocks that are done with a row
};

// Of scores that are chosen from where they are read, which lie where choose_place.cuh says.
struct StreamTurn {
  Turn turn = Turn::alone;
  Heads heads;
  int* scored = nullptr;         // [B * Hkv], tiles that are done
  const int64_t* pos = nullptr;  // of the step's tokens
  int64_t pos_b = 0;
  int sub = 1;  // tokens of an entry
};

// Of what reads a list, chosen or standing: beside hfl_layer_group.
struct ListTurn {
  Turn turn = Turn::alone;
  Heads heads;
  int* arrived = nullptr;   // [B * Hkv]
  int* appended = nullptr;  // [B * Hkv]
  int* scored = nullptr;   // as above
  const float* scores = nullptr;
  void* scratch = nullptr;
  bool followed = false;  // by another kernel of the step, which is set up at once
};

struct PickTurn {
  Turn turn = Turn::alone;
  int* scored = nullptr;  // as above; `blocks` of them are awaited
  int blocks = 0;
  int* picked = nullptr;  // [B * Hs], set to the number of `readers`: units that read the row, and count it down
  int readers = 0;
};

struct AttendTurn {
  Turn turn = Turn::alone;
  Heads heads;
  int* appended = nullptr;  // [B * Hkv], likewise of the token that this kernel stores; else it stores none
  int* picked = nullptr;
  hfl_append append;
};

// As hfl_*_cuda, as part of a step.
const char* score_in_turn(const hfl_score& a, const ScoreTurn& turn);
const char* score_stream(const hfl_score& a, const StreamTurn& turn);
const char* pick_in_turn(const hfl_pick& a, const PickTurn& turn);
const char* attend_in_turn(const hfl_attend& a, const AttendTurn& turn);
// Of two groups at once, where one kernel can be that of both.
bool attend_together(const hfl_attend& a, const hfl_attend& b);
const char* attend_both_in_turn(const hfl_attend (&a)[2], const AttendTurn (&turns)[2]);

// Scores and a choice as above, for those who read the list in the other way; and how many numbers the scores are.
bool chooses(const hfl_layer_group& g);
int64_t chosen_scores(const hfl_layer_group& g);
const char* choose_in_turn(const hfl_layer_group& g, const float* scores, const PickTurn& turn, void* stream);

// A group's step over a list in two kernels, or in one where the list stands; where it fits, and what it takes.
bool list_takes(const hfl_layer_group& g);
int64_t list_scratch(const hfl_layer_group& g);  // bytes
const char* list_in_turn(const hfl_layer_group& g, const ListTurn& turn, void* stream);

// The same in one kernel, of a group that is alone in its layer: where rows are short.
bool cluster_takes(const hfl_layer_group& g);
const char* cluster_in_turn(const hfl_layer_group& g, const Heads& heads, void* stream);

// What is needed of them before.
const char* wrong_append(const hfl_append& a);
const char* wrong_attend(const hfl_attend& a);
const char* wrong_score(const hfl_score& a);
int score_blocks(const hfl_score& a);  // that work on a row
bool score_streams(const hfl_score& a);
int score_tiles(const hfl_score& a);
int attend_units(const hfl_attend& a);  // of a KV head
int64_t attend_scratch(const hfl_attend& a, int others, int32_t* splits);  // with so many other blocks beside
bool attend_fits(const hfl_attend& a);  // all blocks of a step have room on the device at a time, so that they may wait

}  // namespace hfl
