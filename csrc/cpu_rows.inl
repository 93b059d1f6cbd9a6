// The row kernels over cpu_lanes.inl; included like it. Nothing of the standard library that is a
// template may be used here: its instance would carry the instruction set into the whole program.
// `scratch` has room for one row of mapped logits; null where the map is the identity.

constexpr int kUnroll = 4;

template <typename Acc>
DS_ALIGN_INLINE typename Lanes<Acc>::Vector mapped(const LogitMap<Acc>& map,
                                                   typename Lanes<Acc>::Vector raw,
                                                   typename Lanes<Acc>::Vector bias) {
  raw = (raw + bias) * map.scale;
  if (map.softcap == 0) return raw;
  return hyperbolic_tangent(raw / map.softcap) * map.softcap;
}

// dL/draw, from L.
template <typename Value, typename Acc>
DS_ALIGN_INLINE Value slope(const LogitMap<Acc>& map, Value logit) {
  if (map.softcap == 0) return Value{} + map.scale;
  // Divided: cap * (1 / cap) is not 1 for every cap, and a saturated logit has no slope.
  const Value ratio = logit / map.softcap;
  return (1 - ratio * ratio) * map.scale;
}

template <typename Logit, typename Acc>
DS_ALIGN_INLINE void map_row(const LogitMap<Acc>& map, const Logit* raw, int64_t count,
                             Acc* logits) {
  constexpr int kCount = Lanes<Acc>::kCount;
  const typename Lanes<Acc>::Vector none = {};
  int64_t j = 0;
  for (; j + kCount <= count; j += kCount) {
    store(logits + j, mapped(map, load(raw + j), map.bias ? load(map.bias + j) : none));
  }
  if (j < count) {
    const auto bias = map.bias ? load_part(map.bias + j, count - j, Acc(0)) : none;
    store_part(logits + j, mapped(map, load_part(raw + j, count - j, Acc(0)), bias), count - j);
  }
}

template <typename Logit>
DS_ALIGN_INLINE auto maximum_of_row(const Logit* row, int64_t count) {
  using Acc = typename Accumulation<Logit>::Type;
  using Vector = typename Lanes<Acc>::Vector;
  constexpr int kCount = Lanes<Acc>::kCount;
  constexpr Acc kLowest = -infinity<Acc>();
  Vector best[kUnroll];
  for (Vector& lane : best) lane = (Vector){} + kLowest;
  int64_t j = 0;
  for (; j + kUnroll * kCount <= count; j += kUnroll * kCount) {
    for (int u = 0; u < kUnroll; ++u) {
      const Vector value = load(row + j + u * kCount);
      best[u] = value > best[u] ? value : best[u];
    }
  }
  for (; j < count; j += kCount) {
    const Vector value =
        count - j >= kCount ? load(row + j) : load_part(row + j, count - j, kLowest);
    best[0] = value > best[0] ? value : best[0];
  }
  for (int u = 1; u < kUnroll; ++u) best[0] = best[u] > best[0] ? best[u] : best[0];
  return maximum_of_lanes(best[0]);
}

template <typename Vector>
struct RowSums {
  Vector total = {};
  Vector squares = {};
  Vector logits = {};
};

// One vector of pass two: exp(L - shift) into the sums and, weighted by the slope, into `weights`.
template <bool kWeights, bool kSlope, bool kStatistics, typename Acc, typename Vector>
DS_ALIGN_INLINE Vector add_lanes(RowSums<Vector>& sums, const LogitMap<Acc>& map, Vector logits,
                                 Acc shift) {
  const Vector value = exponential(logits - shift);
  sums.total += value;
  if (kStatistics) sums.squares += value * value;
  if (!kWeights || !kSlope) return value;
  return value * slope(map, logits);
}

template <bool kWeights, bool kSlope, bool kStatistics, typename Logit, typename Acc, typename Out>
DS_ALIGN_INLINE RowSums<Acc> sums_of_row(const Logit* row, int64_t count, const LogitMap<Acc>& map,
                                         Acc shift, Out* weights) {
  using Vector = typename Lanes<Acc>::Vector;
  constexpr int kCount = Lanes<Acc>::kCount;
  RowSums<Vector> sums[kUnroll];
  int64_t j = 0;
  for (; j + kUnroll * kCount <= count; j += kUnroll * kCount) {
    for (int u = 0; u < kUnroll; ++u) {
      const Vector logits = load(row + j + u * kCount);
      const Vector value = add_lanes<kWeights, kSlope, kStatistics>(sums[u], map, logits, shift);
      if (kStatistics) sums[u].logits += logits;
      if (kWeights) store(weights + j + u * kCount, value);
    }
  }
  for (; j < count; j += kCount) {
    const int64_t left = count - j < kCount ? count - j : kCount;
    const Vector logits = load_part(row + j, left, -infinity<Acc>());
    const Vector value = add_lanes<kWeights, kSlope, kStatistics>(sums[0], map, logits, shift);
    if (kStatistics) sums[0].logits += load_part(row + j, left, Acc(0));
    if (kWeights) store_part(weights + j, value, left);
  }
  RowSums<Acc> result;
  result.total = sum_of_lanes((sums[0].total + sums[1].total) + (sums[2].total + sums[3].total));
  result.squares =
      sum_of_lanes((sums[0].squares + sums[1].squares) + (sums[2].squares + sums[3].squares));
  result.logits =
      sum_of_lanes((sums[0].logits + sums[1].logits) + (sums[2].logits + sums[3].logits));
  return result;
}

template <typename Row, typename Logit, typename Acc, typename Out>
DS_ALIGN_INLINE RowSums<Acc> sums_of_row(const LseTile<Logit, Acc, Out>& tile, const Row* row,
                                         Acc shift, Out* weights, bool plain) {
  const int64_t count = tile.num_columns;
  const LogitMap<Acc>& map = tile.map;
  if (weights == nullptr) {
    return tile.statistics ? sums_of_row<false, false, true>(row, count, map, shift, weights)
                           : sums_of_row<false, false, false>(row, count, map, shift, weights);
  }
  if (plain) {
    return tile.statistics ? sums_of_row<true, false, true>(row, count, map, shift, weights)
                           : sums_of_row<true, false, false>(row, count, map, shift, weights);
  }
  return tile.statistics ? sums_of_row<true, true, true>(row, count, map, shift, weights)
                         : sums_of_row<true, true, false>(row, count, map, shift, weights);
}

// Takes one row of the tile into the state; `row` holds its logits, mapped or as they came.
template <typename Row, typename Logit, typename Acc, typename Out>
DS_ALIGN_INLINE void lse_row(const LseTile<Logit, Acc, Out>& tile, const Row* row, int64_t i,
                             bool plain) {
  Acc* state = tile.state + i;
  const int64_t stride = tile.state_stride;
  const int64_t column = tile.labels[i] - tile.first;
  if (column >= 0 && column < tile.num_columns) {
    const Acc logit = to_float(row[column]);
    state[kLabelLogit * stride] = logit;
    state[kLabelSlope * stride] = slope(tile.map, logit);
  }
  const Acc before = state[kMaximum * stride];
  const Acc here = maximum_of_row(row, tile.num_columns);
  const Acc maximum = here > before ? here : before;
  // While all logits so far are -inf, (-inf) - (-inf) would be NaN; relative to 0 their
  // exponentials are 0.
  const Acc shift = maximum == -infinity<Acc>() ? Acc(0) : maximum;
  const Acc shrink = std::exp(before - shift);
  Out* weights = tile.weights == nullptr ? nullptr : tile.weights + i * tile.weights_stride;
  const RowSums<Acc> sums = sums_of_row(tile, row, shift, weights, plain);
  state[kMaximum * stride] = maximum;
  state[kTotal * stride] = state[kTotal * stride] * shrink + sums.total;
  state[kShrink * stride] = shrink;
  if (tile.statistics & kWithSquares) {
    state[kSquares * stride] = state[kSquares * stride] * (shrink * shrink) + sums.squares;
  }
  if (tile.statistics & kWithLogitSum) state[kLogitSum * stride] += sums.logits;
}

template <typename Logit, typename Acc, typename Out>
void lse_rows(const LseTile<Logit, Acc, Out>& tile, int64_t begin, int64_t end, Acc* scratch) {
  const bool plain = scratch == nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const Logit* row = tile.logits + i * tile.logits_stride;
    if (plain) {
      lse_row(tile, row, i, plain);
    } else {
      map_row(tile.map, row, tile.num_columns, scratch);
      lse_row(tile, scratch, i, plain);
    }
  }
}

template <bool kSlope, typename Row, typename Acc, typename Out>
DS_ALIGN_INLINE void gradient_of_row(const Row* row, int64_t count, const LogitMap<Acc>& map,
                                     Acc maximum, Acc factor, Out* out) {
  constexpr int kCount = Lanes<Acc>::kCount;
  int64_t j = 0;
  for (; j < count; j += kCount) {
    const int64_t left = count - j;
    const auto logits = left >= kCount ? load(row + j) : load_part(row + j, left, Acc(0));
    auto value = exponential(logits - maximum) * factor;
    if (kSlope) value *= slope(map, logits);
    if (left >= kCount) {
      store(out + j, value);
    } else {
      store_part(out + j, value, left);
    }
  }
}

template <typename Row, typename Logit, typename Acc, typename Out>
DS_ALIGN_INLINE void grad_row(const GradTile<Logit, Acc, Out>& tile, const Row* row, int64_t i,
                              bool plain) {
  const Acc maximum = tile.state[kMaximum * tile.state_stride + i];
  const Acc factor = -tile.grad[i] / tile.state[kTotal * tile.state_stride + i];
  Out* out = tile.out + i * tile.out_stride;
  const int64_t column = tile.labels[i] - tile.first;
  const bool has_label = column >= 0 && column < tile.num_columns;
  // Before the loop, which may overwrite the row.
  const Acc logit = has_label ? to_float(row[column]) : Acc(0);
  if (plain) {
    gradient_of_row<false>(row, tile.num_columns, tile.map, maximum, factor, out);
  } else {
    gradient_of_row<true>(row, tile.num_columns, tile.map, maximum, factor, out);
  }
  if (has_label) {
    const Acc share = std::exp(logit - maximum) * factor;
    put(out + column, (tile.grad[i] + share) * slope(tile.map, logit));
  }
}

template <typename Logit, typename Acc, typename Out>
void grad_rows(const GradTile<Logit, Acc, Out>& tile, int64_t begin, int64_t end, Acc* scratch) {
  const bool plain = scratch == nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const Logit* row = tile.logits + i * tile.logits_stride;
    if (tile.labels[i] < 0) {
      Out* out = tile.out + i * tile.out_stride;
      for (int64_t j = 0; j < tile.num_columns; ++j) put(out + j, Acc(0));
    } else if (plain) {
      grad_row(tile, row, i, plain);
    } else {
      map_row(tile.map, row, tile.num_columns, scratch);
      grad_row(tile, scratch, i, plain);
    }
  }
}
