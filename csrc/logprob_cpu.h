// Entry points of the row kernels for CPUs: rows [begin, end) of a tile, for the caller's threads.
#pragma once

#include "logprob.h"

namespace ds_align {

// A bfloat16 number as its bits.
struct BFloat16 {
  uint16_t bits;
};

void lse_rows(const LseTile<float, float, float>& tile, int64_t begin, int64_t end);
void lse_rows(const LseTile<BFloat16, float, BFloat16>& tile, int64_t begin, int64_t end);
void lse_rows(const LseTile<double, double, double>& tile, int64_t begin, int64_t end);

void grad_rows(const GradTile<float, float, float>& tile, int64_t begin, int64_t end);
void grad_rows(const GradTile<BFloat16, float, BFloat16>& tile, int64_t begin, int64_t end);
void grad_rows(const GradTile<double, double, double>& tile, int64_t begin, int64_t end);

}  // namespace ds_align
