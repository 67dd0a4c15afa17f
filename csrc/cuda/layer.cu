// ops.attend_layer: a decode step of a layer, one token a row: what every group of heads does, from fresh keys to the
// result, in kernels that hand over row by row (step.cuh).
//
// Kernels: the scores of each group that chooses, then what each of them picks, then attention of each group, whose
//   first blocks store the token; two groups may share a launch. So a group whose choice stands takes one launch; the
//   others' attention begins with the first rows that are picked, and the tokens are stored, and groups without a
//   choice are read, meanwhile. Where it fits (score_stream.cuh, choose.cuh, attend_list.cu) scores are streamed and
//   chosen from by a faster kernel, or where the list is read, which saves the launch between; of short rows one kernel
//   does all (attend_cluster.cu).
// What is scored does not wait for the token: it lies in a block that is forced, whose score nobody reads.
// Bound by: bytes of summaries, keys and values, and by about five waits for memory that follow each other.
#include <utility>

#include "step.cuh"

namespace hfl {
namespace {

constexpr int MOST_GROUPS = 16;

// Counters of a group, one part after the other: of its units; tokens stored; rows picked; rows scored; scores that are
// chosen from, which are zero until they are there.
struct Counters {
  int64_t problems = 0, units = 0, rows = 0, scores = 0;

  explicit Counters(const hfl_layer_group& g)
      : problems(static_cast<int64_t>(g.attend.batch) * g.attend.kv_heads),
        units(problems * attend_units(g.attend)),
        rows(g.score.scores ? static_cast<int64_t>(g.pick.batch) * g.pick.heads : 0),
        scores(chooses(g) ? chosen_scores(g) : 0) {}
  int64_t all() const { return (units + problems + 2 * rows + 31) / 32 * 32 + scores; }
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

// A step of a layer, kernel by kernel.
class Step {
 public:
  explicit Step(const hfl_layer& layer) : layer_(layer) {
    char* scratch = static_cast<char*>(layer.scratch);
    int* counters = layer.counters;
    for (int i = 0; i < layer.count; ++i) {
      const hfl_layer_group& g = layer.groups[i];
      const Counters own(g);
      Group& group = groups_[i];
      group.list = list_takes(g), group.chooses = chooses(g), group.heads = heads_of(g);
      group.units = counters, group.appended = counters + own.units, group.picked = group.appended + own.problems;
      group.scored = group.picked + own.rows, counters += own.all();
      group.scores = reinterpret_cast<float*>(counters - own.scores);
      int64_t bytes = 0;
      group.attend = g.attend, group.attend.splits = 1;
      if (group.list) {
        bytes = list_scratch(g);
      } else {
        bytes = attend_scratch(g.attend, static_cast<int>(own.problems), &group.attend.splits);
      }
      group.attend.scratch = scratch, group.attend.counters = group.units, group.attend.stream = layer.stream;
      scratch += in_pieces(bytes);
    }
  }

  const char* run() {
    const char* message = nullptr;
    if (layer_.count == 1 && cluster_takes(layer_.groups[0])) {
      return cluster_in_turn(layer_.groups[0], groups_[0].heads, layer_.stream);
    }
    for (int i = 0; i < layer_.count && !message; ++i) {
      if (layer_.groups[i].score.scores) message = score(layer_.groups[i], groups_[i]);
    }
    for (int i = 0; i < layer_.count && !message; ++i) {
      if (layer_.groups[i].score.scores && !groups_[i].list) message = pick(layer_.groups[i], groups_[i]);
    }
    for (int i = 0; i < layer_.count && !message; ++i) {
      const bool both = i + 1 < layer_.count && !groups_[i].list && !groups_[i + 1].list &&
                        attend_together(groups_[i].attend, groups_[i + 1].attend);
      message = groups_[i].list ? read_list(i) : both ? attend_both(i) : attend(i);
      i += both ? 1 : 0;
    }
    return message;
  }

 private:
  struct Group {
    bool list, chooses;
    Heads heads;
    int *units, *appended, *picked, *scored;
    float* scores;
    hfl_attend attend;
  };

  const hfl_layer& layer_;
  Group groups_[MOST_GROUPS];
  Turn turn_ = Turn::first;

  Turn in_turn() { return std::exchange(turn_, Turn::later); }

  const char* score(const hfl_layer_group& g, const Group& group) {
    hfl_score score = g.score;
    score.stream = layer_.stream;
    if (group.chooses) {
      StreamTurn in;
      in.turn = in_turn(), in.heads = group.heads, in.scored = group.scored;
      in.pos = g.append.pos, in.pos_b = g.append.pos_b, in.sub = g.append.sub;
      score.scores = group.scores;
      return score_stream(score, in);
    }
    ScoreTurn in;
    in.turn = in_turn(), in.heads = group.heads, in.scored = group.scored;
    return score_in_turn(score, in);
  }

  const char* pick(const hfl_layer_group& g, const Group& group) {
    const Counters own(g);
    hfl_pick pick = g.pick;
    pick.stream = layer_.stream;
    PickTurn in;
    in.turn = in_turn(), in.picked = group.picked, in.scored = group.scored;
    in.readers = static_cast<int>(own.units / own.rows);
    if (group.chooses) return choose_in_turn(g, group.scores, in, layer_.stream);
    in.blocks = score_blocks(g.score);
    return pick_in_turn(pick, in);
  }

  AttendTurn turn_of(int i) const {
    const hfl_layer_group& g = layer_.groups[i];
    AttendTurn in;
    in.heads = groups_[i].heads, in.append = g.append, in.appended = groups_[i].appended;
    if (g.score.scores) in.picked = groups_[i].picked;
    return in;
  }

  const char* read_list(int i) {
    const hfl_layer_group& g = layer_.groups[i];
    const Group& group = groups_[i];
    ListTurn in;
    in.followed = i + 1 < layer_.count;
    in.turn = in_turn(), in.heads = group.heads, in.arrived = group.units, in.appended = group.appended;
    in.scored = group.scored, in.scores = group.scores, in.scratch = group.attend.scratch;
    return list_in_turn(g, in, layer_.stream);
  }

  const char* attend(int i) {
    AttendTurn in = turn_of(i);
    in.turn = in_turn();
    return attend_in_turn(groups_[i].attend, in);
  }

  const char* attend_both(int i) {
    AttendTurn turns[2] = {turn_of(i), turn_of(i + 1)};
    turns[0].turn = turns[1].turn = in_turn();
    const hfl_attend both[2] = {groups_[i].attend, groups_[i + 1].attend};
    return attend_both_in_turn(both, turns);
  }
};

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
    if (hfl::list_takes(g)) {
      bytes += hfl::in_pieces(hfl::list_scratch(g));
      continue;
    }
    bytes += hfl::in_pieces(hfl::attend_scratch(g.attend, static_cast<int>(own.problems), &g.attend.splits));
    if (!hfl::attend_fits(g.attend)) return -1;
  }
  return bytes;
}

extern "C" const char* hfl_layer_cuda(const hfl_layer* layer) {
  const char* message = hfl::check(*layer);
  if (message) return message;
  if (!layer->counters) return "attend_layer: expected counters";
  return hfl::Step(*layer).run();
}
