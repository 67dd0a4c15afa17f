// What prefill_any.cuh has in shared memory: rows, packed ones on their way, and what is known of them.
#pragma once
#include "prefill_mma.cuh"
#include "prefill_turn.cuh"

namespace hfl {

// Shared memory beyond that of PrefillRoom: packed keys and values on their way, as wide as those of 8 bits.
template <int D>
struct AnyRoom : PrefillRoom<D, D == 256 ? 2 : 1> {
  using R = PrefillRoom<D, D == 256 ? 2 : 1>;
  static constexpr int PAYLOAD = R::KEYS * D, PAYLOADS = R::BYTES;
  static constexpr int bytes(int bits) { return R::BYTES + (bits ? 2 * PAYLOAD : 0); }
};

// A tile of a pass over them.
struct Step {
  int index, resume;  // resume: where the second pass begins
  bool first, more;   // more: there is one
  KeyTile tile;
};

// What is known of rows that are in shared memory. That of two tiles: of one it is still read, of the next written.
template <int D>
struct Notes {
  using R = AnyRoom<D>;
  Step steps[2];
  Turning<R::ROWS, R::KEYS> turning;
  Frequencies<D> frequencies;
  int place[2][R::KEYS];  // positions of keys, -1: none
  int key_turn[R::KEYS], query_turn[R::ROWS];
  int seat[R::ROWS];           // from where queries see the keys of a pass: their positions, or elsewhere
  __half2 sides[2 * R::KEYS];  // scale and zero of keys, then of values
};

}  // namespace hfl
