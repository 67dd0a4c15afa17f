// 16 rows of a weight and some tokens, a chunk of columns of which lies in shared memory for one warp: as operands.
#pragma once
#include "linear.cuh"

namespace hfl {

template <Form F>
struct RowsTile {
  static constexpr int CHUNK = F == Form::BYTES ? 64 : 128;                         // columns, and bytes of a token
  static constexpr int LEVELS = F == Form::GROUP ? 32 : F == Form::FINE ? 128 : 0;  // bytes of scales, behind the codes
  static constexpr int TILE = 1024 + LEVELS;

  // What the number of each 16 bytes of a token is changed by.
  __device__ __forceinline__ static int turn(int token) { return CHUNK == 128 ? token % 8 : token / 2 % 4; }

  __device__ __forceinline__ static uint32_t levels(uint32_t tile, int group, int lane) {
    return load_word(tile + 1024 + group * 32 + lane / 4 * 4);
  }

  // Operand a of 64 columns; groups: in the chunk; by: the scales where there is one group.
  __device__ __forceinline__ static void codes(uint32_t (&a)[8], uint32_t tile, int half, int groups, const Levels& by,
                                               int lane) {
    const uint32_t at = tile + lane * 16;
    if constexpr (F == Form::BYTES) {
      const uint4 x = load_shared(at), y = load_shared(at + 512);
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w, a[4] = y.x, a[5] = y.y, a[6] = y.z, a[7] = y.w;
    } else {
      const uint4 x = load_shared(at + half * 512);
      if constexpr (F == Form::CHANNEL) {
        expand(a, x.x, x.y), expand(a + 4, x.z, x.w);
      } else if constexpr (F == Form::GROUP) {
        expand(a, x.x, x.y, by), expand(a + 4, x.z, x.w, by);
      } else {
        expand(a, x.x, x.y, Levels(levels(tile, 2 * half * groups / 4, lane)));
        expand(a + 4, x.z, x.w, Levels(levels(tile, (2 * half + 1) * groups / 4, lane)));
      }
    }
  }
};

}  // namespace hfl
