// ops.attend_layer: a decode step of a layer, one token a row: what every group of heads does, from fresh keys to the
// result, in kernels that hand over row by row (step.cuh).
//
// Kernels: the scores of each group that chooses, then what each of them picks, then attention of each group, whose
//   first blocks store the token. So a group whose choice stands takes one launch; the others' attention begins with the
//   first rows that are picked, and the tokens are stored, and groups without a choice are read, meanwhile.
// What is scored does not wait for the token: it lies in a block that is forced, whose score nobody reads.
// Bound by: bytes of summaries, keys and values, and by about five waits for memory that follow each other.
#include <utility>

#include "step.cuh"

namespace hfl {
namespace {

constexpr int MOST_GROUPS = 16;

// Counters of a group, one part after the other: of its units; tokens stored; rows picked; rows scored.
struct Counters {
  int64_t problems = 0, units = 0, rows = 0;

  explicit Counters(const hfl_layer_group& g)
      : problems(static_cast<int64_t>(g.attend.batch) * g.attend.kv_heads),
        units(problems * attend_units(g.attend)),
        rows(g.score.scores ? static_cast<int64_t>(g.pick.batch) * g.pick.heads : 0) {}
  int64_t all() const { return units + problems + 2 * rows; }
};

int64_t in_pieces(int64_t bytes) { return (bytes + 127) / 128 * 128; }

const char* check(const hfl_layer& layer) {
  if (layer.count < 1 || layer.count > MOST_GROUPS) return "attend_layer: expected 1 to 16 groups of heads";
  for (int i = 0; i < layer.count; ++i) {
    const hfl_layer_group& g = layer.groups[i];
    const char* message = wrong_append(g.append);
    if (message) return message;
    const hfl_attend& a = g.attend;
    if (g.append.tokens != 1 || a.tokens != 1 || !a.q_pos || a.q_before || g.append.dtype == HFL_F32) {
      return "attend_layer: expected one token a row, of 16 bits, at its position in the text";
    }
    if (g.append.batch != a.batch || g.append.kv_heads != a.kv_heads || a.kv_heads > MOST_HEADS) {
      return "attend_layer: expected at most 128 KV heads, and as many of a group everywhere";
    }
    for (int h = 0; h < a.kv_heads; ++h) {
      if (g.heads[h] >= MOST_HEADS) return "attend_layer: expected numbers of KV heads below 128";
    }
    if (a.ids && a.select_heads != 1 && a.select_heads != a.kv_heads) {
      return "attend_layer: expected a selection for each KV head or for all";
    }
    if (!g.score.scores) continue;
    const int heads = g.score.share == HFL_ALL ? 1 : a.kv_heads;
    if (g.score.batch != a.batch || g.score.kv_heads != a.kv_heads || g.score.tokens != 1 || a.select_heads != heads ||
        g.pick.queries != 1 || g.pick.batch != a.batch || g.pick.heads != heads || g.pick.scores != g.score.scores ||
        g.pick.chosen < 1 || g.pick.chosen != a.chosen || g.pick.ids != a.ids || a.pages) {
      return "attend_layer: expected that what is scored is picked and what is picked is read";
    }
  }
  return nullptr;
}

Heads heads_of(const hfl_layer_group& g) {
  Heads heads;
  heads.mapped = true;
  for (int h = 0; h < g.attend.kv_heads; ++h) heads.at[h] = g.heads[h];
  return heads;
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_layer_scratch(const hfl_layer* layer, int64_t* counters) {
  *counters = 0;
  if (hfl::check(*layer)) return 0;  // hfl_layer_cuda will say why
  int64_t bytes = 0;
  for (int i = 0; i < layer->count; ++i) {
    hfl_layer_group& g = layer->groups[i];
    const hfl::Counters own(g);
    *counters += own.all();
    bytes += hfl::in_pieces(hfl::attend_scratch(g.attend, static_cast<int>(own.problems), &g.attend.splits));
    if (!hfl::attend_fits(g.attend)) return -1;
  }
  return bytes;
}

extern "C" const char* hfl_layer_cuda(const hfl_layer* layer) {
  const char* message = hfl::check(*layer);
  if (message) return message;
  if (!layer->counters) return "attend_layer: expected counters";
  hfl::Turn turn = hfl::Turn::first;
  const auto in_turn = [&] { return std::exchange(turn, hfl::Turn::later); };
  int* counters = layer->counters;
  int64_t at[hfl::MOST_GROUPS] = {};
  for (int i = 1; i < layer->count; ++i) at[i] = at[i - 1] + hfl::Counters(layer->groups[i - 1]).all();
  for (int i = 0; i < layer->count; ++i) {
    const hfl_layer_group& g = layer->groups[i];
    if (!g.score.scores) continue;
    const hfl::Counters own(g);
    hfl_score score = g.score;
    score.stream = layer->stream;
    hfl::ScoreTurn in;
    in.turn = in_turn(), in.heads = hfl::heads_of(g);
    in.scored = counters + at[i] + own.units + own.problems + own.rows;
    message = hfl::score_in_turn(score, in);
    if (message) return message;
  }
  for (int i = 0; i < layer->count; ++i) {
    const hfl_layer_group& g = layer->groups[i];
    if (!g.score.scores) continue;
    const hfl::Counters own(g);
    hfl_pick pick = g.pick;
    pick.stream = layer->stream;
    hfl::PickTurn in;
    in.turn = in_turn(), in.picked = counters + at[i] + own.units + own.problems, in.scored = in.picked + own.rows;
    in.blocks = hfl::score_blocks(g.score);
    in.readers = static_cast<int>(own.units / own.rows);
    message = hfl::pick_in_turn(pick, in);
    if (message) return message;
  }
  char* scratch = static_cast<char*>(layer->scratch);
  hfl_attend attends[2];
  hfl::AttendTurn turns[2];
  for (int i = 0; i < layer->count;) {
    int together = 0;
    do {
      const hfl_layer_group& g = layer->groups[i];
      const hfl::Counters own(g);
      hfl_attend& attend = attends[together];
      attend = g.attend;
      attend.stream = layer->stream, attend.scratch = scratch, attend.counters = counters + at[i];
      int32_t splits = 0;
      scratch += hfl::in_pieces(hfl::attend_scratch(attend, static_cast<int>(own.problems), &splits));
      attend.splits = splits;
      hfl::AttendTurn& in = turns[together] = hfl::AttendTurn();
      in.heads = hfl::heads_of(g), in.append = g.append, in.appended = attend.counters + own.units;
      if (g.score.scores) in.picked = in.appended + own.problems;
      ++i;
    } while (++together < 2 && i < layer->count);
    const hfl::Turn now = in_turn();
    turns[0].turn = turns[1].turn = now;
    const bool one = together == 2 && hfl::attend_together(attends[0], attends[1]);
    if (one) message = hfl::attend_both_in_turn(attends, turns);
    for (int j = 0; j < together && !one && !message; ++j) {
      if (j > 0) turns[j].turn = hfl::Turn::later;
      message = hfl::attend_in_turn(attends[j], turns[j]);
    }
    if (message) return message;
  }
  return nullptr;
}
