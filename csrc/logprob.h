// What the row kernels compute, for CPU and CUDA alike. No torch here: the CUDA kernels and the CPU
// shim that tests them include this file too.
//
// A tile is a block of raw logits, num_rows tokens x num_columns consecutive vocabulary entries,
// the first of which is entry `first`. Its logits are
//   L = softcap(scale * (raw + bias)),  softcap(z) = cap * tanh(z / cap).
// Per token the state holds the running values of all tiles so far, one row of the state tensor
// each.
#pragma once

#include <cstdint>

namespace ds_align {

// Rows of the state tensor [kStateRows, tokens]; ds_align/kernels/reference.py names them alike.
enum StateRow : int {
  kMaximum = 0,     // m = max L; starts at -inf
  kTotal = 1,       // s = sum exp(L - m); starts at 0
  kLabelLogit = 2,  // L[label]; starts at NaN, so that a label beyond the vocabulary stays loud
  kLabelSlope = 3,  // d L[label] / d raw[label]; 1 but for a scale or soft cap
  kSquares = 4,     // sum exp 2 (L - m); only with kWithSquares
  kLogitSum = 5,    // sum L; only with kWithLogitSum
  kShrink = 6,  // exp(m_before - m): by what older sums relative to m were scaled in the last tile
  kStateRows = 7,
};

// Bits of the `statistics` argument.
enum Statistics : int { kWithSquares = 1, kWithLogitSum = 2 };

template <typename Acc>
struct LogitMap {
  const Acc* bias;  // [num_columns] or null
  Acc scale;        // 1: none
  Acc softcap;      // 0: none
};

// The state of the tile's rows is read and written. With `weights`, exp(L - m) * dL/draw is written
// too, relative to the maximum after this tile; it may be the tile itself.
template <typename Logit, typename Acc, typename Out>
struct LseTile {
  const Logit* logits;
  int64_t logits_stride;  // elements between rows; columns are adjacent
  int64_t num_rows;
  int64_t num_columns;
  const int64_t* labels;  // [num_rows]; below 0: ignored
  int64_t first;
  Acc* state;
  int64_t state_stride;
  LogitMap<Acc> map;
  Out* weights;  // or null
  int64_t weights_stride;
  int statistics;
};

// out = grad * (onehot(label) - exp(L - m) / s) * dL/draw, from a finished state; `out` may be the
// tile itself. Rows with an ignored label give 0, whatever their logits.
template <typename Logit, typename Acc, typename Out>
struct GradTile {
  const Logit* logits;
  int64_t logits_stride;
  int64_t num_rows;
  int64_t num_columns;
  const int64_t* labels;
  int64_t first;
  const Acc* state;
  int64_t state_stride;
  LogitMap<Acc> map;
  const Acc* grad;  // [num_rows]
  Out* out;
  int64_t out_stride;
};

}  // namespace ds_align
